//! The example of a Kubernetes job: valid by the schemas of Kubernetes, and its arguments and exit codes are the program's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use lockstep::error::Exit;
use serde_json::Value;

use crate::kit::area::lockstep;
use crate::kit::pair::{Pair, damage, options};
use crate::kit::python::python;
use crate::kit::{ends, key, until};

fn job_file() -> PathBuf {
    example("check-job.yaml")
}

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config/kubernetes").join(name)
}

/// What the schemas of these versions say: the first where a policy for failures is on by itself, and the newest known.
fn validate(file: &Path) -> [Output; 2] {
    ["1.31.0", "1.37.0"].map(|version| {
        let mut command = python("kubernetes_validate");
        command.args(["-m", "kubernetes_validate", "--strict", "-k", version]).arg(file);
        command.output().unwrap()
    })
}

fn job() -> Value {
    documents("check-job.yaml").remove(0)
}

fn documents(name: &str) -> Vec<Value> {
    let script = "import json, sys, yaml; json.dump(list(yaml.safe_load_all(open(sys.argv[1]))), sys.stdout)";
    let output = python("yaml").args(["-c", script]).arg(example(name)).output().unwrap();
    ends(&output, 0, &[]);
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn s30_the_kubernetes_job_is_valid_and_a_wrong_key_is_not() {
    for output in validate(&job_file()) {
        ends(&output, 0, &[]);
    }
    let at = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(job_file()).unwrap();
    for (right, wrong) in [
        ("restartPolicy: Never", "restartsPolicy: Never"),
        ("operator: In", "operators: In"),
        ("readOnlyRootFilesystem: true", "readOnlyRootFileSystem: true"),
        ("values: [1, 2, 3, 4]", "values: [bad]"),
    ] {
        let file = at.path().join("wrong.yaml");
        assert!(text.contains(right));
        fs::write(&file, text.replace(right, wrong)).unwrap();
        for output in validate(&file) {
            assert!(!output.status.success(), "'{wrong}' is taken for valid");
        }
    }
}

/// A service of the examples: its configuration and its pod.
fn service(name: &str) -> (String, Value) {
    let documents = documents(name);
    let config = documents[0]["data"]["config.toml"].as_str().unwrap().to_owned();
    (config, documents[1]["spec"]["template"]["spec"].clone())
}

#[test]
fn the_services_of_kubernetes_are_valid_and_their_mounts_lead_somewhere() {
    for name in ["serve-daemonset.yaml", "daemon.yaml"] {
        for output in validate(&example(name)) {
            ends(&output, 0, &[]);
        }
        let at = tempfile::tempdir().unwrap();
        let file = at.path().join("wrong.yaml");
        let text = fs::read_to_string(example(name)).unwrap();
        fs::write(&file, text.replace("readOnlyRootFilesystem", "readOnlyRootFileSystem")).unwrap();
        for output in validate(&file) {
            assert!(!output.status.success(), "a wrong key of {name} is taken for valid");
        }
        let (_, pod) = service(name);
        let volumes: Vec<&Value> = pod["volumes"].as_array().unwrap().iter().map(|volume| &volume["name"]).collect();
        for kind in ["initContainers", "containers"] {
            for mount in pod[kind][0]["volumeMounts"].as_array().unwrap() {
                assert!(volumes.contains(&&mount["name"]), "{name}: {mount}");
            }
        }
    }
}

/// The arguments of a container, with its directories below `at`.
fn arguments(pod: &Value, kind: &str, at: &Path) -> Vec<String> {
    let arguments = pod[kind][0]["args"].as_array().unwrap();
    arguments.iter().map(|argument| below(argument.as_str().unwrap(), at)).collect()
}

fn below(text: &str, at: &Path) -> String {
    ["/etc/lockstep", "/var/lib/lockstep", "/run/lockstep", "/data"]
        .iter()
        .fold(text.to_owned(), |text, place| text.replace(place, &format!("{}{place}", at.display())))
}

#[test]
fn the_services_of_kubernetes_work_together() {
    use std::os::unix::fs::PermissionsExt as _;
    let (serving, sending) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for (at, place) in [(&serving, "data"), (&sending, "data/checkpoints")] {
        fs::create_dir_all(at.path().join("etc/lockstep/keys")).unwrap();
        fs::create_dir_all(at.path().join(place)).unwrap();
    }
    let keys = |at: &tempfile::TempDir| at.path().join("etc/lockstep/keys");
    key(&keys(&serving), "host_key");
    key(&keys(&sending), "id_ed25519");
    fs::copy(keys(&sending).join("id_ed25519.pub"), keys(&serving).join("sync")).unwrap();
    fs::set_permissions(keys(&serving).join("sync"), fs::Permissions::from_mode(0o400)).unwrap();
    let write = |at: &tempfile::TempDir, config: &str| {
        fs::write(at.path().join("etc/lockstep/config.toml"), below(config, at.path())).unwrap();
    };
    let run = |arguments: &[String]| {
        let mut command = Command::new(lockstep());
        command.args(arguments).env("HOME", sending.path()).env_remove("SSH_AUTH_SOCK");
        command
    };

    let (config, pod) = service("serve-daemonset.yaml");
    let group = own_group();
    write(&serving, &config.replace("0.0.0.0:2222", "127.0.0.1:0").replace("\"1000\"", &format!("\"{group}\"")));
    let check = run(&arguments(&pod, "initContainers", serving.path())).output().unwrap();
    ends(&check, 0, &["a server for 1 user; nothing is wrong"]);
    let port_file = serving.path().join("port");
    let mut serve = run(&arguments(&pod, "containers", serving.path()));
    let serve = Stopped(serve.arg("--port-file").arg(&port_file).stderr(std::process::Stdio::null()).spawn().unwrap());
    until("the server", || fs::read_to_string(&port_file).is_ok_and(|port| port.ends_with('\n')));
    let port = fs::read_to_string(&port_file).unwrap().trim().to_owned();

    let public = fs::read_to_string(keys(&serving).join("host_key.pub")).unwrap();
    fs::write(keys(&sending).join("known_hosts"), format!("[127.0.0.1]:{port} {public}")).unwrap();
    let (config, pod) = service("daemon.yaml");
    let here = config.replace("sync@gpu001:", "sync@127.0.0.1:").replace(", \"sync@gpu002:/checkpoints\"", "");
    write(&sending, &here);
    let with_port = |kind| -> Vec<String> {
        let arguments = arguments(&pod, kind, sending.path());
        arguments.into_iter().map(|argument| argument.replace("--port=2222", &format!("--port={port}"))).collect()
    };
    let mut check = with_port("initContainers");
    check.extend(["--connect".to_owned(), "-F".into(), "none".into()]);
    ends(&run(&check).output().unwrap(), 0, &["new", "lockstep"]);
    fs::create_dir_all(sending.path().join("run/lockstep")).unwrap();
    let mut daemon = run(&with_port("containers"));
    let daemon = Stopped(daemon.args(["-F", "none"]).stderr(std::process::Stdio::null()).spawn().unwrap());
    fs::write(sending.path().join("data/checkpoints/notes"), "text").unwrap();
    until("the file", || fs::read(serving.path().join("data/checkpoints/notes")).is_ok_and(|text| text == b"text"));
    // The probe: a daemon that answers is alive, whatever its targets do; one that is gone is not.
    let probe = pod["containers"][0]["livenessProbe"]["exec"]["command"][2].as_str().unwrap();
    let probe = below(probe, sending.path()).replace("lockstep status", &format!("{} status", lockstep()));
    let alive = || Command::new("sh").args(["-c", &probe]).status().unwrap().success();
    assert!(alive());
    drop(serve);
    assert!(alive());
    drop(daemon);
    assert!(!alive());
}

/// A process that is ended with this.
struct Stopped(std::process::Child);

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A group that whoever runs the tests may give files to.
fn own_group() -> String {
    let output = Command::new("id").arg("-g").output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn s30_the_kubernetes_job_fails_on_the_exit_codes_of_bad_data_and_repeats_the_others() {
    let job = job();
    let rules = job["spec"]["podFailurePolicy"]["rules"].as_array().unwrap();
    let failing: Vec<&Value> = rules.iter().filter(|rule| rule["action"] == "FailJob").collect();
    let [rule] = failing[..] else { panic!("one rule fails the job: {failing:?}") };
    let codes = &rule["onExitCodes"];
    assert_eq!(codes["operator"], "In");
    let values: Vec<u64> = codes["values"].as_array().unwrap().iter().map(|code| code.as_u64().unwrap()).collect();
    let expected = [Exit::BadData, Exit::Usage, Exit::Trust, Exit::Incomplete].map(|exit| u64::from(exit.code()));
    assert_eq!(values, expected);
    // The schema does not know that these belong together; the server would refuse the job.
    let pod = &job["spec"]["template"]["spec"];
    assert_eq!(pod["initContainers"][0]["name"], codes["containerName"]);
    assert_eq!(pod["restartPolicy"], "Never");
    let volumes: Vec<&Value> = pod["volumes"].as_array().unwrap().iter().map(|volume| &volume["name"]).collect();
    for kind in ["initContainers", "containers"] {
        for mount in pod[kind][0]["volumeMounts"].as_array().unwrap() {
            assert!(volumes.contains(&&mount["name"]), "{mount}");
        }
    }
}

/// What builds the image: a compiler that is new enough, and all that `Cargo.toml` names.
#[test]
fn s30_the_image_is_built_of_what_cargo_wants() {
    let image = fs::read_to_string(example("Containerfile")).unwrap();
    let wanted: toml::Table =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).unwrap().parse().unwrap();
    let package = &wanted["package"];
    assert!(image.contains(&format!("FROM rust:{}-", package["rust-version"].as_str().unwrap())), "{image}");
    assert!(image.contains(&format!("lockstep:{}", package["version"].as_str().unwrap())), "{image}");
    for target in ["test", "bench"].iter().flat_map(|kind| wanted[*kind].as_array().unwrap()) {
        let path = target.get("path").and_then(|path| path.as_str()).map(str::to_owned);
        let path = path.unwrap_or_else(|| format!("benches/{}.rs", target["name"].as_str().unwrap()));
        assert!(image.contains(&path), "{path} is not in: {image}");
    }
}

/// What the init container runs, with its mounts at `at`.
fn check(job: &Value, at: &Path) -> Output {
    let arguments = job["spec"]["template"]["spec"]["initContainers"][0]["args"].as_array().unwrap();
    let arguments = arguments.iter().map(|argument| {
        let argument = argument.as_str().unwrap();
        argument
            .replace("/verdict/", &format!("{}/verdict-", at.display()))
            .replace("/data/", &format!("{}/", at.display()))
    });
    Command::new(lockstep()).args(arguments).output().unwrap()
}

#[test]
fn s30_the_kubernetes_init_container_ends_with_0_on_good_data_alone() {
    let (job, pair) = (job(), Pair::new());
    pair.write("weights", &[1; 3000]);
    assert!(pair.push(&options()).is_complete());
    let at = tempfile::tempdir().unwrap();
    let data = at.path().join("checkpoint-1000");
    fs::rename(&pair.target, &data).unwrap();
    ends(&check(&job, at.path()), 0, &["good"]);
    assert!(at.path().join("verdict-verdict.json").exists());
    assert!(!data.join(".lockstep/verdict.json").exists(), "the volume is read-only");
    damage(&data.join("weights"));
    ends(&check(&job, at.path()), 1, &["modified: weights", "push it again"]);
    fs::remove_dir_all(&data).unwrap();
    ends(&check(&job, at.path()), 5, &["checkpoint-1000"]);
}
