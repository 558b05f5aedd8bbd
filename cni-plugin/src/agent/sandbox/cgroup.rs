//! Whose a process is: the pod's uid in `/proc/<pid>/cgroup`.
//!
//! A line is `hierarchy:controllers:path`, one for cgroup v2 and one for each hierarchy of v1. Drivers and runtimes differ in the path:
//! `/kubepods/burstable/pod<uid>/<container>` (cgroupfs), `/kubepods.slice/…-pod<uid with _>.slice/cri-containerd-<container>.scope`
//! (systemd; `crio-…`, `docker-…`), `/system.slice/containerd.service/kubepods-…-pod<uid>.slice:cri-containerd:<container>`. All
//! have `pod<uid>` as the last part of a name, which is all that is read here.

/// The uid, with dashes.
///
/// `Ok(None)`: the process is of no pod. An error: it seems to be of several, as those of a kubelet inside a pod are.
pub fn pod_uid(cgroup: &str) -> Result<Option<String>, Ambiguous> {
    let mut found: Option<String> = None;
    for line in cgroup.lines() {
        let Some(path) = line.splitn(3, ':').nth(2) else { continue };
        for uid in uids(path) {
            match &found {
                Some(known) if *known != uid => return Err(Ambiguous),
                Some(_) => {}
                None => found = Some(uid),
            }
        }
    }
    Ok(found)
}

/// The cgroups of one process name several pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ambiguous;

const WORD: &str = "pod";
/// Lengths of an API object's uid and of a static pod's hash.
const LENGTHS: [usize; 2] = [36, 32];

fn uids(path: &str) -> impl Iterator<Item = String> + '_ {
    path.match_indices(WORD).filter_map(|(at, _)| {
        let starts = path[..at].chars().next_back().is_none_or(|c| matches!(c, '/' | '-'));
        let rest = &path[at + WORD.len()..];
        let end = rest.find(|c: char| !is_part_of_uid(c)).unwrap_or(rest.len());
        let uid = rest[..end].replace('_', "-");
        (starts && LENGTHS.contains(&uid.len())).then_some(uid)
    })
}

fn is_part_of_uid(c: char) -> bool {
    matches!(c, '0'..='9' | 'a'..='f' | '-' | '_')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UID: &str = "2a4f6c8e-0b1d-4f3a-9c5e-7d9b1f3a5c7e";
    const OTHER: &str = "00000000-0b1d-4f3a-9c5e-7d9b1f3a5c7e";

    fn slice(uid: &str) -> String {
        format!("kubepods-burstable-pod{}.slice", uid.replace('-', "_"))
    }

    #[test]
    fn every_driver_and_runtime_is_understood() {
        let id = "f".repeat(64);
        let slice = slice(UID);
        let paths = [
            (
                "v2, systemd, containerd",
                format!("0::/kubepods.slice/kubepods-burstable.slice/{slice}/cri-containerd-{id}.scope"),
            ),
            (
                "v2, systemd, guaranteed",
                format!("0::/kubepods.slice/kubepods-pod{}.slice/cri-containerd-{id}.scope", UID.replace('-', "_")),
            ),
            ("v2, seen from another cgroup", format!("0::/../../{slice}/cri-containerd-{id}.scope")),
            ("v2, cgroupfs", format!("0::/kubepods/besteffort/pod{UID}/{id}")),
            ("v2, cgroupfs, guaranteed", format!("0::/kubepods/pod{UID}/{id}")),
            (
                "v1, cgroupfs, docker",
                format!(
                    "12:cpu,cpuacct:/kubepods/burstable/pod{UID}/{id}\n11:pids:/kubepods/burstable/pod{UID}/{id}\n1:name=systemd:/kubepods/burstable/pod{UID}/{id}\n0::/"
                ),
            ),
            ("v1, systemd, docker", format!("4:memory:/kubepods.slice/{slice}/docker-{id}.scope")),
            (
                "systemd, cri-o",
                format!("0::/kubepods.slice/kubepods-burstable.slice/{slice}/crio-{id}.scope/container"),
            ),
            ("cri-o, conmon", format!("0::/kubepods.slice/{slice}/crio-conmon-{id}.scope")),
            (
                "containerd without a systemd driver",
                format!("1:name=systemd:/system.slice/containerd.service/{slice}:cri-containerd:{id}"),
            ),
            (
                "a node in a container",
                format!(
                    "0::/docker/{id}/kubelet.slice/kubelet-kubepods.slice/kubelet-{slice}/cri-containerd-{id}.scope"
                ),
            ),
            ("the pod's own cgroup", format!("0::/kubepods/pod{UID}")),
        ];
        for (what, text) in paths {
            assert_eq!(pod_uid(&text), Ok(Some(UID.to_owned())), "{what}: {text}");
        }
        let hash = "0123456789abcdef0123456789abcdef";
        assert_eq!(pod_uid(&format!("0::/kubepods/pod{hash}/x")), Ok(Some(hash.to_owned())), "a static pod");
    }

    #[test]
    fn what_is_of_no_pod_or_of_two_is_told_apart() {
        for none in [
            "",
            "0::/",
            "0::/system.slice/kubelet.service",
            "0::/kubepods.slice/kubepods-burstable.slice",
            "0::/kubepods/podman/x",
            "0::/kubepods/pod2a4f6c8e-0b1d/x",
            &format!("0::/tripod{UID}/x"),
            &format!("0::/kubepods/pod{UID}0/x"),
            "no colons pod",
        ] {
            assert_eq!(pod_uid(none), Ok(None), "{none}");
        }
        let nested = format!("0::/kubepods/pod{UID}/x/kubepods/pod{OTHER}/y");
        assert_eq!(pod_uid(&nested), Err(Ambiguous));
        assert_eq!(pod_uid(&format!("2:cpu:/kubepods/pod{UID}\n1:pids:/kubepods/pod{OTHER}")), Err(Ambiguous));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic_and_what_it_finds_is_a_uid(text in "(0::|1:a:|[/:\n]|pod|kubepods|[0-9a-f_-]{30,37}|é|\\PC){0,12}") {
            if let Ok(Some(uid)) = pod_uid(&text) {
                prop_assert!(LENGTHS.contains(&uid.len()) && uid.chars().all(|c| is_part_of_uid(c) && c != '_'));
            }
        }

        #[test]
        fn a_uid_is_found_whatever_surrounds_it(before in "(/[a-z.-]{0,8}){0,3}", after in "(/[a-z.-]{1,8}){0,3}", systemd in any::<bool>()) {
            let name = if systemd { slice(UID) } else { format!("pod{UID}") };
            prop_assert_eq!(pod_uid(&format!("0::{before}/{name}{after}")), Ok(Some(UID.to_owned())));
        }
    }
}
