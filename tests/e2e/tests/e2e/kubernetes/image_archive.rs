// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Images with a config of the test's own on the layers of busybox, made in the node.

use std::fs;
use std::path::PathBuf;

use e2e::{BUSYBOX, run};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// An OCI image layout that an image is made in; it goes with the value.
struct Layout(PathBuf);

impl Drop for Layout {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Layout {
    fn path(&self, of: &str) -> String {
        self.0.join(of).display().to_string()
    }

    fn read(&self, digest: &Value) -> Value {
        let (algorithm, sum) = digest.as_str().unwrap().split_once(':').unwrap();
        let text = fs::read(self.path(&format!("blobs/{algorithm}/{sum}"))).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    /// Writes a blob and gives its descriptor.
    fn write(&self, media_type: &str, content: &Value) -> Value {
        let text = content.to_string();
        let sum = Sha256::digest(&text);
        let sum: String = sum.iter().map(|byte| format!("{byte:02x}")).collect();
        fs::write(self.path(&format!("blobs/sha256/{sum}")), &text).unwrap();
        json!({"mediaType": media_type, "digest": format!("sha256:{sum}"), "size": text.len()})
    }
}

/// Makes the image `name` of busybox' layers, or of none, with the `config` of the OCI image configuration.
pub(crate) fn make(name: &str, config: &Value, layers: usize) {
    let layout = Layout(std::env::temp_dir().join(format!("image-{}", std::process::id())));
    fs::create_dir_all(&layout.0).unwrap();
    let (old, new) = (layout.path("old.tar"), layout.path("new.tar"));
    run("ctr", &["-n", "k8s.io", "images", "export", &old, BUSYBOX]).success();
    run("tar", &["-xf", &old, "-C", &layout.path("")]).success();
    fs::remove_file(&old).unwrap();

    let index: Value =
        serde_json::from_slice(&fs::read(layout.path("index.json")).unwrap()).unwrap();
    let mut manifest = layout.read(&index["manifests"][0]["digest"]);
    let mut configuration = layout.read(&manifest["config"]["digest"]);
    configuration["config"] = config.clone();
    let cut = |list: &mut Value| list.as_array_mut().unwrap().truncate(layers);
    cut(&mut configuration["rootfs"]["diff_ids"]);
    cut(&mut manifest["layers"]);
    manifest["config"] = layout.write("application/vnd.oci.image.config.v1+json", &configuration);
    let mut entry = layout.write("application/vnd.oci.image.manifest.v1+json", &manifest);
    entry["annotations"] = json!({"io.containerd.image.name": name});
    let index = json!({"schemaVersion": 2, "manifests": [entry]});
    fs::write(layout.path("index.json"), index.to_string()).unwrap();
    let parts = ["index.json", "oci-layout", "blobs"];
    let mut pack = vec!["-cf", &new, "-C", layout.0.to_str().unwrap()];
    pack.extend(parts);
    run("tar", &pack).success();
    run("ctr", &["-n", "k8s.io", "images", "import", &new]).success();
}
