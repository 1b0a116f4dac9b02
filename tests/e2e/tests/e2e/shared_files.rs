// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the containers of a pod may do with files that they share, in an emptyDir and in a directory of the host's.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use e2e::{Node, eventually};

use crate::cri_client::{Kubelet, Pod};
use crate::volumes::{IDLE, PYTHON, PodDir, import_python, mount, output, run_with, sh};

/// One container holds things and answers over a socket what becomes of them. It is the process that the other asks.
const HOLDER: &str = "
import ctypes, fcntl, mmap, os, socket, struct
os.chdir('/v')
libc = ctypes.CDLL(None, use_errno=True)
with open('mapped', 'wb') as file:
    file.truncate(8192)
mapped = mmap.mmap(os.open('mapped', os.O_RDWR), 8192)
flocked = open('flocked', 'w')
fcntl.flock(flocked, fcntl.LOCK_EX)
locked = open('locked', 'w+')
fcntl.lockf(locked, fcntl.LOCK_EX, 10, 5)
os.mkdir('watched')
watch = libc.inotify_init()
assert libc.inotify_add_watch(watch, b'watched', 0x100) >= 0  # IN_CREATE
os.mkfifo('pipe')
server = socket.socket(socket.AF_UNIX)
server.bind('socket')
server.listen()
print('ready', flush=True)
client = server.accept()[0].makefile('rw')
def ask(expected):
    line = client.readline().strip()
    assert line == expected, line
def tell(line):
    print(line, file=client, flush=True)
ask('mapped')
assert mapped[4096] == 7, mapped[4096]
mapped[1] = 9
tell('mapped too')
ask('watched')
name = os.read(watch, 4096)[16:].rstrip(b'\\0').decode()
tell(name)
ask('pipe')
with open('pipe', 'w') as pipe:
    pipe.write('through the pipe')
ask('unlock')
fcntl.flock(flocked, fcntl.LOCK_UN)
fcntl.lockf(locked, fcntl.LOCK_UN, 10, 5)
tell('unlocked')
ask('end')
";

const CLIENT: &str = "
import fcntl, mmap, os, socket
os.chdir('/v')
server = socket.socket(socket.AF_UNIX)
server.connect('socket')
server = server.makefile('rw')
def ask(line):
    print(line, file=server, flush=True)
    return server.readline().strip()
def refused(lock, *arguments):
    try:
        lock(*arguments)
    except BlockingIOError:
        return True
mapped = mmap.mmap(os.open('mapped', os.O_RDWR), 8192)
mapped[4096] = 7
assert ask('mapped') == 'mapped too'
assert mapped[1] == 9, mapped[1]
flocked = open('flocked', 'w')
locked = open('locked', 'r+')
assert refused(fcntl.flock, flocked, fcntl.LOCK_EX | fcntl.LOCK_NB), 'flock'
assert refused(fcntl.lockf, locked, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 9), 'lockf'
fcntl.lockf(locked, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 15)
open('watched/made', 'w').close()
assert ask('watched') == 'made'
print('pipe', file=server, flush=True)
assert open('pipe').read() == 'through the pipe'
assert ask('unlock') == 'unlocked'
fcntl.flock(flocked, fcntl.LOCK_EX | fcntl.LOCK_NB)
fcntl.lockf(locked, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5)
print('end', file=server, flush=True)
print('all is well')
";

/// What one process does with files.
const FILES: &str = "
import mmap, os, stat
os.chdir('/v')
with open('one', 'w') as file:
    file.write('content')
    file.flush()
    os.fsync(file.fileno())
os.link('one', 'two')
assert os.stat('two').st_nlink == 2 and os.stat('one').st_ino == os.stat('two').st_ino
os.rename('two', 'three')
os.unlink('three')
os.chown('one', 1234, 5678)
os.chmod('one', 0o4755)
assert stat.S_IMODE(os.stat('one').st_mode) == 0o4755
os.setxattr('one', 'user.note', b'value')
assert os.getxattr('one', 'user.note') == b'value' and os.listxattr('one') == ['user.note']
os.mkdir('sticky')
os.chmod('sticky', 0o1777)
fd = os.open('direct', os.O_RDWR | os.O_CREAT | os.O_DIRECT)
page = mmap.mmap(-1, 4096)
page.write(b'd' * 4096)
assert os.write(fd, page) == 4096
os.lseek(fd, 0, 0)
assert os.readv(fd, [page]) == 4096
os.close(fd)
held = open('gone', 'w+')
os.unlink('gone')
held.write('still there')
held.seek(0)
assert held.read() == 'still there'
print('all is well')
";

fn python(kubelet: &Kubelet, pod: &Pod, name: &str, script: &str, volume: &Path) -> String {
    let id = kubelet
        .create_with(pod, name, 0, &["python3", "-uc", script], |config| {
            config.mounts = vec![mount(volume, "/v", false)];
            config.image.as_mut().unwrap().image = PYTHON.to_owned();
        })
        .unwrap();
    kubelet.start(&id);
    id
}

fn succeeds(kubelet: &Kubelet, name: &str, id: &str) {
    let code = kubelet.exit_code(id);
    let errors = kubelet.log(name, 0, "stderr");
    assert_eq!(code, 0, "{name}: {errors}");
}

fn volumes(dir: &PodDir) -> [(&'static str, PathBuf); 2] {
    [
        ("disk", dir.empty_dir("disk")),
        ("host", dir.claim("pvc-1")),
    ]
}

#[test]
fn containers_share_sockets_pipes_mappings_locks_and_notifications() {
    let _node = Node::new("containers_share_sockets_pipes_mappings_locks_and_notifications");
    import_python();
    let dir = PodDir::new("together");
    let mut kubelet = Kubelet::new("together");
    let pod = kubelet.run_pod("together");
    for (medium, volume) in volumes(&dir) {
        let [holder, client] = ["holder", "client"].map(|role| format!("{role}-{medium}"));
        let first = python(&kubelet, &pod, &holder, HOLDER, &volume);
        eventually("the holder is ready", || {
            let ready = kubelet.log(&holder, 0, "stdout").contains("ready");
            let errors = kubelet.log(&holder, 0, "stderr");
            assert_eq!(errors, "", "{holder}");
            ready.then_some(())
        });
        let second = python(&kubelet, &pod, &client, CLIENT, &volume);
        succeeds(&kubelet, &client, &second);
        succeeds(&kubelet, &holder, &first);
    }
}

#[test]
fn files_have_links_modes_attributes_and_direct_io() {
    let _node = Node::new("files_have_links_modes_attributes_and_direct_io");
    import_python();
    let dir = PodDir::new("files");
    let mut kubelet = Kubelet::new("files");
    let pod = kubelet.run_pod("files");
    for (medium, volume) in volumes(&dir) {
        let name = format!("files-{medium}");
        let id = python(&kubelet, &pod, &name, FILES, &volume);
        succeeds(&kubelet, &name, &id);
    }
    let one = fs::metadata(dir.claim("pvc-1").join("one")).unwrap();
    assert_eq!(
        (one.uid(), one.gid(), one.mode() & 0o7777),
        (1234, 5678, 0o4755)
    );
}

#[test]
fn directory_of_20_000_entries_is_whole() {
    let _node = Node::new("directory_of_20_000_entries_is_whole");
    let dir = PodDir::new("large-dir");
    let mut kubelet = Kubelet::new("large-dir");
    let pod = kubelet.run_pod("large-dir");
    let claim = dir.claim("pvc-1");
    for number in 0..20_000 {
        fs::write(claim.join(format!("file-{number:05}")), "").unwrap();
    }
    let mounts = vec![mount(&claim, "/v", true)];
    let main = run_with(&kubelet, &pod, "main", &IDLE, mounts);
    let script = "ls /v > /list; wc -l < /list; sort -u /list | wc -l; tail -1 /list";
    assert_eq!(
        output(&kubelet, &main, script),
        "20000\n20000\nfile-19999\n"
    );
}

#[test]
fn single_file_is_written_in_place_and_not_replaced() {
    let _node = Node::new("single_file_is_written_in_place_and_not_replaced");
    let dir = PodDir::new("single");
    let mut kubelet = Kubelet::new("single");
    let pod = kubelet.run_pod("single");
    let file = dir.path.join("settings");
    fs::write(&file, "before\n").unwrap();
    chown(&file, Some(0), Some(2000)).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o664)).unwrap();
    let mounts = vec![mount(&file, "/etc/settings", false)];
    let main = run_with(&kubelet, &pod, "main", &IDLE, mounts);
    assert_eq!(output(&kubelet, &main, "cat /etc/settings"), "before\n");
    // A mount point can be neither replaced nor removed, with any runtime.
    for script in ["echo x > /new && mv /new /etc/settings", "rm /etc/settings"] {
        let refused = kubelet.exec(&main, &sh(script));
        assert!(refused.stderr.contains("busy"), "{script}: {refused:?}");
    }
    output(&kubelet, &main, "echo after >> /etc/settings");
    assert_eq!(fs::read_to_string(&file).unwrap(), "before\nafter\n");
    let script = "sed -i s/localhost/x/ /etc/hosts";
    assert!(kubelet.exec(&main, &sh(script)).stderr.contains("busy"));
    output(&kubelet, &main, "echo 10.9.9.9 added >> /etc/hosts");
}
