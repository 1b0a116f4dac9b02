// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! From a process inside its container to the program it is to run: limits, user, capabilities, seccomp, execve.
//!
//! The order is runc's. A filter needs `CAP_SYS_ADMIN` unless no_new_privs is set, so it is loaded before the user changes
//! in the first case and as the last thing in the second.

use std::ffi::{CString, OsStr};
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{IOPriorityClass, LinuxSeccomp, PosixRlimit, PosixRlimitType, Process};
use rustix::fs::{Access, AtFlags, Gid, Mode, Uid};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{
    set_keep_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

use crate::Error;
use crate::capabilities::Sets;
use crate::error::Context as _;
use crate::seccomp::Filter;
use crate::sys;

/// `/etc/passwd` is read up to this many bytes for the home directory.
const MAX_PASSWD_LEN: u64 = 1024 * 1024;

/// umask(2) where the spec names none, as runc's.
const DEFAULT_UMASK: u32 = 0o022;

/// A process that only lacks its program.
pub(crate) struct Prepared {
    program: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    /// Still to be loaded.
    filter: Option<Filter>,
    name: String,
}

/// Gives the calling process everything that `process` says, except the program.
///
/// # Errors
/// [`Error`]; [`Error::Executable`] if there is no such program.
pub(crate) fn prepare(
    process: &Process,
    seccomp: Option<&LinuxSeccomp>,
) -> Result<Prepared, Error> {
    for limit in process.rlimits().iter().flatten() {
        set_limit(limit)?;
    }
    set_io_priority(process)?;
    let umask = process.user().umask().unwrap_or(DEFAULT_UMASK);
    rustix::process::umask(Mode::from_raw_mode(umask & 0o777));
    let mut filter = seccomp.map(Filter::compile).transpose()?;
    let sets = Sets::parse(process.capabilities().as_ref())?;
    let user = Uid::from_raw(process.user().uid());
    own_streams(user)?;
    let early = rustix::process::chdir(process.cwd());
    if process.no_new_privileges() == Some(true) {
        set_no_new_privs(true).step(|| "setting no_new_privs".to_owned())?;
    } else if let Some(filter) = filter.take() {
        filter.load()?;
    }
    sets.limit_bounding()?;
    become_user(process, user)?;
    if early.is_err() {
        // The directory may be one that only the user may enter.
        rustix::process::chdir(process.cwd())
            .step(|| format!("entering the working directory {}", process.cwd().display()))?;
    }
    sets.apply()?;
    check_directory()?;
    let environment = environment(process, user);
    let arguments = process.args().as_deref().unwrap_or_default();
    let name = arguments.first().cloned().unwrap_or_default();
    let program = find_program(&name, &environment)?;
    Ok(Prepared {
        program: text(program.as_os_str().as_encoded_bytes())?,
        arguments: arguments
            .iter()
            .map(|argument| text(argument.as_bytes()))
            .collect::<Result<_, _>>()?,
        environment: environment
            .iter()
            .map(|entry| text(entry.as_bytes()))
            .collect::<Result<_, _>>()?,
        filter,
        name,
    })
}

impl Prepared {
    /// Runs the program. Only comes back with the reason why it did not.
    pub(crate) fn run(self) -> Error {
        if let Err(error) = self.filter.map_or(Ok(()), Filter::load) {
            return error;
        }
        let failed = nix::unistd::execve(&self.program, &self.arguments, &self.environment);
        let errno = failed.err().unwrap_or(nix::errno::Errno::UnknownErrno);
        Error::Executable {
            name: self.name,
            problem: errno.desc().to_lowercase(),
        }
    }

    /// The process's environment, for hooks.
    pub(crate) fn environment(&self) -> &[CString] {
        &self.environment
    }
}

fn text(bytes: &[u8]) -> Result<CString, Error> {
    CString::new(bytes)
        .map_err(|_| Error::invalid("process.args and process.env", "have a NUL byte"))
}

fn set_limit(limit: &PosixRlimit) -> Result<(), Error> {
    let resource = match limit.typ() {
        PosixRlimitType::RlimitCpu => Resource::Cpu,
        PosixRlimitType::RlimitFsize => Resource::Fsize,
        PosixRlimitType::RlimitData => Resource::Data,
        PosixRlimitType::RlimitStack => Resource::Stack,
        PosixRlimitType::RlimitCore => Resource::Core,
        PosixRlimitType::RlimitRss => Resource::Rss,
        PosixRlimitType::RlimitNproc => Resource::Nproc,
        PosixRlimitType::RlimitNofile => Resource::Nofile,
        PosixRlimitType::RlimitMemlock => Resource::Memlock,
        PosixRlimitType::RlimitAs => Resource::As,
        PosixRlimitType::RlimitLocks => Resource::Locks,
        PosixRlimitType::RlimitSigpending => Resource::Sigpending,
        PosixRlimitType::RlimitMsgqueue => Resource::Msgqueue,
        PosixRlimitType::RlimitNice => Resource::Nice,
        PosixRlimitType::RlimitRtprio => Resource::Rtprio,
        PosixRlimitType::RlimitRttime => Resource::Rttime,
    };
    // RLIM_INFINITY is all ones in both.
    let value = |value: u64| (value != u64::MAX).then_some(value);
    setrlimit(
        resource,
        Rlimit {
            current: value(limit.soft()),
            maximum: value(limit.hard()),
        },
    )
    .step(|| {
        format!(
            "setting {} to {}/{}",
            limit.typ(),
            limit.soft(),
            limit.hard()
        )
    })
}

fn set_io_priority(process: &Process) -> Result<(), Error> {
    let Some(priority) = process.io_priority() else {
        return Ok(());
    };
    let class = match priority.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    let level = u16::try_from(priority.priority())
        .ok()
        .filter(|level| *level < 8)
        .ok_or_else(|| Error::invalid("process.ioPriority.priority", "is not 0 to 7"))?;
    sys::set_io_priority(class, level).step(|| "setting the I/O priority".to_owned())
}

/// Lets the user open `/dev/stdout` and its like again: they lead to pipes of the agent's, which root owns.
fn own_streams(user: Uid) -> Result<(), Error> {
    let (input, output, errors) = (
        rustix::stdio::stdin(),
        rustix::stdio::stdout(),
        rustix::stdio::stderr(),
    );
    for stream in [input.as_fd(), output.as_fd(), errors.as_fd()] {
        let found = rustix::fs::fstat(stream).step(|| "looking at a standard stream".to_owned())?;
        let null = found.st_rdev == rustix::fs::makedev(1, 3);
        if null || found.st_uid == user.as_raw() {
            continue;
        }
        rustix::fs::fchown(stream, Some(user), None)
            .step(|| "giving a standard stream to the process's user".to_owned())?;
    }
    Ok(())
}

fn become_user(process: &Process, user: Uid) -> Result<(), Error> {
    let group = Gid::from_raw(process.user().gid());
    let others: Vec<Gid> = process
        .user()
        .additional_gids()
        .iter()
        .flatten()
        .map(|group| Gid::from_raw(*group))
        .collect();
    set_keep_capabilities(true)
        .step(|| "keeping capabilities over the change of user".to_owned())?;
    set_thread_groups(&others).step(|| "setting the additional groups".to_owned())?;
    set_thread_res_gid(group, group, group)
        .step(|| format!("becoming group {}", process.user().gid()))?;
    set_thread_res_uid(user, user, user)
        .step(|| format!("becoming user {}", process.user().uid()))?;
    set_keep_capabilities(false).step(|| "forgetting the kept capabilities".to_owned())
}

/// A working directory outside the root would be a way out (CVE-2024-21626).
fn check_directory() -> Result<(), Error> {
    let directory =
        rustix::process::getcwd(Vec::new()).step(|| "reading the working directory".to_owned())?;
    if directory.to_bytes().first() == Some(&b'/') {
        Ok(())
    } else {
        Err(Error::invalid(
            "process.cwd",
            "is outside of the container's root file system",
        ))
    }
}

fn environment(process: &Process, user: Uid) -> Vec<String> {
    let mut environment = process.env().clone().unwrap_or_default();
    if !environment.iter().any(|entry| entry.starts_with("HOME=")) {
        environment.push(format!(
            "HOME={}",
            home(user).unwrap_or_else(|| "/".to_owned())
        ));
    }
    environment
}

fn home(user: Uid) -> Option<String> {
    let file = std::fs::File::open("/etc/passwd").ok()?;
    BufReader::new(file.take(MAX_PASSWD_LEN))
        .lines()
        .map_while(Result::ok)
        .find_map(|line| home_of(&line, user.as_raw()))
}

/// The home directory in a line of passwd(5), if the line is `user`'s.
fn home_of(line: &str, user: u32) -> Option<String> {
    let mut fields = line.split(':');
    let number = fields.nth(2)?;
    let home = fields.nth(2)?;
    (number.parse() == Ok(user) && !home.is_empty() && !home.contains('\0'))
        .then(|| home.to_owned())
}

/// Where the program is, looked up as a shell would, with runc's words for what is wrong.
fn find_program(name: &str, environment: &[String]) -> Result<PathBuf, Error> {
    let failed = |problem: String| Error::Executable {
        name: name.to_owned(),
        problem,
    };
    if name.contains('/') {
        return match runnable(Path::new(name)) {
            Ok(()) => Ok(PathBuf::from(name)),
            Err(Errno::NOENT) => Err(failed(format!("stat {name}: no such file or directory"))),
            Err(Errno::ISDIR) => Err(failed("is a directory".to_owned())),
            Err(Errno::ACCESS) => Err(failed("permission denied".to_owned())),
            Err(other) => Err(failed(format!("stat {name}: {other}"))),
        };
    }
    let path = environment
        .iter()
        .rev()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or_default();
    let mut denied = false;
    for directory in std::env::split_paths(OsStr::new(path)) {
        let directory = if directory.as_os_str().is_empty() {
            PathBuf::from(".")
        } else {
            directory
        };
        let candidate = directory.join(name);
        match runnable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Errno::ACCESS) => denied = true,
            Err(_) => {}
        }
    }
    Err(failed(
        if denied {
            "permission denied"
        } else {
            "executable file not found in $PATH"
        }
        .to_owned(),
    ))
}

fn runnable(path: &Path) -> Result<(), Errno> {
    let found = rustix::fs::stat(path)?;
    if rustix::fs::FileType::from_raw_mode(found.st_mode) == rustix::fs::FileType::Directory {
        return Err(Errno::ISDIR);
    }
    rustix::fs::accessat(rustix::fs::CWD, path, Access::EXEC_OK, AtFlags::EACCESS)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn home_comes_from_the_users_line() {
        assert_eq!(
            home_of("www-data:x:33:33::/var/www:/bin/sh", 33).as_deref(),
            Some("/var/www")
        );
        assert_eq!(home_of("www-data:x:33:33::/var/www:/bin/sh", 34), None);
        assert_eq!(home_of("broken", 0), None);
        assert_eq!(home_of("x:x:0:0::", 0), None);
    }

    #[test]
    fn missing_program_is_named_as_runc_does() {
        let environment = ["PATH=/nonexistent:/also-not".to_owned()];
        assert_eq!(
            find_program("nosuch", &environment)
                .unwrap_err()
                .to_string(),
            "exec: \"nosuch\": executable file not found in $PATH"
        );
        assert_eq!(
            find_program("/no/such", &environment)
                .unwrap_err()
                .to_string(),
            "exec: \"/no/such\": stat /no/such: no such file or directory"
        );
        assert_eq!(
            find_program("/", &environment).unwrap_err().to_string(),
            "exec: \"/\": is a directory"
        );
    }

    #[test]
    fn first_runnable_file_in_path_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("tool");
        std::fs::write(&program, "").unwrap();
        let environment = [format!("PATH=/nonexistent:{}", folder.path().display())];
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(find_program("tool", &environment).unwrap(), program);
    }
}
