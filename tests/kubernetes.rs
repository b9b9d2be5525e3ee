//! The example of a Kubernetes job: valid by the schemas of Kubernetes, and its arguments and exit codes are the program's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use lockstep::error::Exit;
use serde_json::Value;

use crate::kit::area::lockstep;
use crate::kit::ends;
use crate::kit::pair::{Pair, damage, options};
use crate::kit::python::python;

fn job_file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config/kubernetes/check-job.yaml")
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
    let script = "import json, sys, yaml; json.dump(yaml.safe_load(open(sys.argv[1])), sys.stdout)";
    let output = python("yaml").args(["-c", script]).arg(job_file()).output().unwrap();
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
