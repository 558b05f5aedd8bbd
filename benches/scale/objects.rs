//! Objects with everything that a cluster adds to what a user writes: defaults, states, and who manages each field. As Kubernetes 1.34
//! fills in a Deployment of one container with a configuration, probes and a projected token, and its EndpointSlices.

use serde_json::{Value, json};

use crate::cluster::Life;

const TIME: &str = "2026-11-20T08:14:31Z";

pub(crate) struct PodFacts<'a> {
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
    pub(crate) app: &'a str,
    pub(crate) uid: &'a str,
    pub(crate) node: &'a str,
    pub(crate) host_address: &'a str,
    pub(crate) address: &'a str,
    pub(crate) life: Life,
}

pub(crate) fn pod(facts: &PodFacts<'_>) -> Value {
    let PodFacts { namespace, name, app, uid, node, host_address, address, life } = facts;
    let ready = if *life == Life::Ready { "True" } else { "False" };
    let condition = |kind: &str, status: &str| json!({"type": kind, "status": status, "observedGeneration": 1, "lastProbeTime": null, "lastTransitionTime": TIME});
    let mut pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "generateName": format!("{app}-6f5b8c9d4f-"),
            "namespace": namespace,
            "uid": uid,
            "generation": 1,
            "creationTimestamp": TIME,
            "labels": labels(app),
            "annotations": {
                "ambient.istio.io/redirection": "enabled",
                "kubectl.kubernetes.io/restartedAt": TIME,
                "prometheus.io/port": "9090",
                "prometheus.io/scrape": "true",
                "checksum/config": "b1946ac92492d2347c6235b4d2611184f3a8e9f4d7f0c6ff8a4e5ad0b3c9d7e1",
            },
            "ownerReferences": [{
                "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": format!("{app}-6f5b8c9d4f"),
                "uid": "0b6e2f3c-93c5-4a53-8b1a-5d0f2f1b7c11", "controller": true, "blockOwnerDeletion": true,
            }],
            "managedFields": pod_fields(address),
        },
        "spec": {
            "volumes": [
                {"name": "config", "configMap": {"name": format!("{app}-config"), "defaultMode": 420}},
                {"name": "tmp", "emptyDir": {}},
                {"name": "kube-api-access-7x2fm", "projected": {
                    "sources": [
                        {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
                        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                        {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}},
                    ],
                    "defaultMode": 420,
                }},
            ],
            "containers": [{
                "name": "app",
                "image": "registry.example.com/shop/checkout-api:2026.11.3-4f2c1a9",
                "args": ["serve", "--config=/etc/app/config.yaml", "--shutdown-grace=20s"],
                "ports": [
                    {"name": "http", "containerPort": 8080, "protocol": "TCP"},
                    {"name": "metrics", "containerPort": 9090, "protocol": "TCP"},
                ],
                "env": [
                    {"name": "POD_NAME", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.name"}}},
                    {"name": "POD_IP", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "status.podIP"}}},
                    {"name": "LOG_LEVEL", "value": "info"},
                    {"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://otel-collector.observability.svc.cluster.local:4317"},
                    {"name": "OTEL_RESOURCE_ATTRIBUTES", "value": "service.name=checkout-api,deployment.environment=production"},
                    {"name": "DATABASE_URL", "valueFrom": {"secretKeyRef": {"name": "checkout-db", "key": "url"}}},
                    {"name": "CACHE_ADDRESS", "value": "redis-master.cache.svc.cluster.local:6379"},
                    {"name": "GOMEMLIMIT", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "0"}}},
                ],
                "resources": {"limits": {"memory": "512Mi"}, "requests": {"cpu": "250m", "memory": "256Mi"}},
                "volumeMounts": [
                    {"name": "config", "readOnly": true, "mountPath": "/etc/app"},
                    {"name": "tmp", "mountPath": "/tmp"},
                    {"name": "kube-api-access-7x2fm", "readOnly": true, "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"},
                ],
                "livenessProbe": {"httpGet": {"path": "/healthz", "port": "http", "scheme": "HTTP"}, "initialDelaySeconds": 10, "timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3},
                "readinessProbe": {"httpGet": {"path": "/ready", "port": "http", "scheme": "HTTP"}, "timeoutSeconds": 1, "periodSeconds": 5, "successThreshold": 1, "failureThreshold": 3},
                "terminationMessagePath": "/dev/termination-log",
                "terminationMessagePolicy": "File",
                "imagePullPolicy": "IfNotPresent",
                "securityContext": {"capabilities": {"drop": ["ALL"]}, "runAsNonRoot": true, "readOnlyRootFilesystem": true, "allowPrivilegeEscalation": false},
            }],
            "restartPolicy": "Always",
            "terminationGracePeriodSeconds": 30,
            "dnsPolicy": "ClusterFirst",
            "serviceAccountName": app,
            "serviceAccount": app,
            "nodeName": node,
            "securityContext": {"runAsUser": 10001, "fsGroup": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
            "imagePullSecrets": [{"name": "registry"}],
            "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": {"labelSelector": {"matchLabels": {"app.kubernetes.io/name": app}}, "topologyKey": "kubernetes.io/hostname"}}]}},
            "schedulerName": "default-scheduler",
            "tolerations": [
                {"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300},
                {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300},
            ],
            "priority": 0,
            "enableServiceLinks": true,
            "preemptionPolicy": "PreemptLowerPriority",
        },
        "status": {
            "observedGeneration": 1,
            "phase": "Running",
            "conditions": [
                condition("PodReadyToStartContainers", "True"),
                condition("Initialized", "True"),
                condition("Ready", ready),
                condition("ContainersReady", ready),
                condition("PodScheduled", "True"),
            ],
            "hostIP": host_address,
            "hostIPs": [{"ip": host_address}],
            "podIP": address,
            "podIPs": [{"ip": address}],
            "startTime": TIME,
            "containerStatuses": [{
                "name": "app",
                "state": {"running": {"startedAt": TIME}},
                "lastState": {},
                "ready": *life == Life::Ready,
                "restartCount": 0,
                "image": "registry.example.com/shop/checkout-api:2026.11.3-4f2c1a9",
                "imageID": "registry.example.com/shop/checkout-api@sha256:6f1e0c7b0a5d4c3b2a19f8e7d6c5b4a3928170605f4e3d2c1b0a998877665544",
                "containerID": "containerd://3c9a5e7d1f20b4c68a7e9d1c3b5f7a9e0d2c4b6a8f1e3d5c7b9a0f2e4d6c8b1a",
                "started": true,
                "allocatedResources": {"cpu": "250m", "memory": "256Mi"},
                "resources": {"limits": {"memory": "512Mi"}, "requests": {"cpu": "250m", "memory": "256Mi"}},
                "volumeMounts": [
                    {"name": "config", "mountPath": "/etc/app", "readOnly": true, "recursiveReadOnly": "Disabled"},
                    {"name": "tmp", "mountPath": "/tmp"},
                    {"name": "kube-api-access-7x2fm", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": true, "recursiveReadOnly": "Disabled"},
                ],
                "user": {"linux": {"uid": 10001, "gid": 0, "supplementalGroups": [0, 10001]}},
            }],
            "qosClass": "Burstable",
        },
    });
    if *life == Life::Terminating {
        pod["metadata"]["deletionTimestamp"] = json!(TIME);
        pod["metadata"]["deletionGracePeriodSeconds"] = json!(30);
    }
    pod
}

fn labels(app: &str) -> Value {
    json!({
        "app": app,
        "app.kubernetes.io/instance": app,
        "app.kubernetes.io/managed-by": "Helm",
        "app.kubernetes.io/name": app,
        "app.kubernetes.io/part-of": "shop",
        "app.kubernetes.io/version": "2026.11.3",
        "helm.sh/chart": "checkout-api-4.7.1",
        "pod-template-hash": "6f5b8c9d4f",
    })
}

/// Of the controller that made the pod, and of the kubelet that runs it.
fn pod_fields(address: &str) -> Value {
    let none = || json!({});
    let named = |names: &[&str]| -> Value {
        names.iter().map(|name| ((*name).to_owned(), none())).collect::<serde_json::Map<_, _>>().into()
    };
    let probe = named(&[
        "f:failureThreshold",
        "f:initialDelaySeconds",
        "f:periodSeconds",
        "f:successThreshold",
        "f:timeoutSeconds",
    ]);
    let env = |name: &str, value: Value| {
        (format!("k:{{\"name\":\"{name}\"}}"), json!({".": {}, "f:name": {}, value.as_str().unwrap_or("f:value"): {}}))
    };
    let envs: serde_json::Map<String, Value> = [
        env("POD_NAME", json!("f:valueFrom")),
        env("POD_IP", json!("f:valueFrom")),
        env("LOG_LEVEL", Value::Null),
        env("OTEL_EXPORTER_OTLP_ENDPOINT", Value::Null),
        env("OTEL_RESOURCE_ATTRIBUTES", Value::Null),
        env("DATABASE_URL", json!("f:valueFrom")),
        env("CACHE_ADDRESS", Value::Null),
        env("GOMEMLIMIT", json!("f:valueFrom")),
    ]
    .into_iter()
    .collect();
    let condition = |kind: &str| {
        (
            format!("k:{{\"type\":\"{kind}\"}}"),
            named(&[".", "f:lastProbeTime", "f:lastTransitionTime", "f:observedGeneration", "f:status", "f:type"]),
        )
    };
    let conditions: serde_json::Map<String, Value> =
        ["ContainersReady", "Initialized", "PodReadyToStartContainers", "Ready"].map(condition).into_iter().collect();
    let port = |port: u16| {
        (
            format!("k:{{\"containerPort\":{port},\"protocol\":\"TCP\"}}"),
            named(&[".", "f:containerPort", "f:name", "f:protocol"]),
        )
    };
    let ports: serde_json::Map<String, Value> = [8080, 9090].map(port).into_iter().collect();
    let container = json!({
        ".": {}, "f:args": {}, "f:env": envs, "f:image": {}, "f:imagePullPolicy": {},
        "f:livenessProbe": {".": {}, "f:httpGet": named(&[".", "f:path", "f:port", "f:scheme"]), "p": probe.clone()},
        "f:readinessProbe": {".": {}, "f:httpGet": named(&[".", "f:path", "f:port", "f:scheme"]), "p": probe},
        "f:name": {}, "f:ports": ports,
        "f:resources": {".": {}, "f:limits": named(&[".", "f:memory"]), "f:requests": named(&[".", "f:cpu", "f:memory"])},
        "f:securityContext": named(&[".", "f:allowPrivilegeEscalation", "f:capabilities", "f:readOnlyRootFilesystem", "f:runAsNonRoot"]),
        "f:terminationMessagePath": {}, "f:terminationMessagePolicy": {},
    });
    let owner = named(&["."]);
    json!([
        {
            "manager": "kube-controller-manager", "operation": "Update", "apiVersion": "v1", "time": TIME, "fieldsType": "FieldsV1",
            "fieldsV1": {
                "f:metadata": {
                    "f:annotations": named(&[".", "f:checksum/config", "f:kubectl.kubernetes.io/restartedAt", "f:prometheus.io/port", "f:prometheus.io/scrape"]),
                    "f:generateName": {},
                    "f:labels": named(&[".", "f:app", "f:app.kubernetes.io/instance", "f:app.kubernetes.io/managed-by", "f:app.kubernetes.io/name", "f:app.kubernetes.io/part-of", "f:app.kubernetes.io/version", "f:helm.sh/chart", "f:pod-template-hash"]),
                    "f:ownerReferences": {".": {}, "k:{\"uid\":\"0b6e2f3c-93c5-4a53-8b1a-5d0f2f1b7c11\"}": owner},
                },
                "f:spec": {
                    "f:affinity": {".": {}, "f:podAntiAffinity": named(&[".", "f:preferredDuringSchedulingIgnoredDuringExecution"])},
                    "f:containers": {"k:{\"name\":\"app\"}": container},
                    "f:dnsPolicy": {}, "f:enableServiceLinks": {}, "f:imagePullSecrets": {".": {}, "k:{\"name\":\"registry\"}": {}},
                    "f:restartPolicy": {}, "f:schedulerName": {}, "f:securityContext": named(&[".", "f:fsGroup", "f:runAsUser", "f:seccompProfile"]),
                    "f:serviceAccount": {}, "f:serviceAccountName": {}, "f:terminationGracePeriodSeconds": {},
                    "f:volumes": {".": {}, "k:{\"name\":\"config\"}": {".": {}, "f:configMap": named(&[".", "f:defaultMode", "f:name"]), "f:name": {}}, "k:{\"name\":\"tmp\"}": named(&[".", "f:emptyDir", "f:name"])},
                },
            },
        },
        {
            "manager": "fairway-node", "operation": "Update", "apiVersion": "v1", "time": TIME, "fieldsType": "FieldsV1", "subresource": "status",
            "fieldsV1": {"f:metadata": {"f:annotations": named(&["f:ambient.istio.io/redirection"])}},
        },
        {
            "manager": "kubelet", "operation": "Update", "apiVersion": "v1", "time": TIME, "fieldsType": "FieldsV1", "subresource": "status",
            "fieldsV1": {"f:status": {
                "f:conditions": conditions, "f:containerStatuses": {}, "f:hostIP": {}, "f:hostIPs": {}, "f:observedGeneration": {}, "f:phase": {}, "f:podIP": {},
                "f:podIPs": {".": {}, format!("k:{{\"ip\":\"{address}\"}}"): named(&[".", "f:ip"])}, "f:startTime": {},
            }},
        },
    ])
}

pub(crate) fn ztunnel_name(node: &str) -> String {
    format!("ztunnel-{}", node.split('.').next().unwrap_or(node))
}

pub(crate) fn ztunnel_uid(node: &str) -> String {
    format!("uid-{}", ztunnel_name(node))
}

pub(crate) fn ztunnel(node: &str, address: &str) -> Value {
    let name = ztunnel_name(node);
    let mut pod = pod(&PodFacts {
        namespace: "istio-system",
        name: &name,
        app: "ztunnel",
        uid: &ztunnel_uid(node),
        node,
        host_address: address,
        address,
        life: Life::Ready,
    });
    // It is on the mesh's own ground, and in no mesh itself.
    pod["metadata"]["annotations"] =
        json!({"ambient.istio.io/redirection": "disabled", "sidecar.istio.io/inject": "false"});
    pod["metadata"]["labels"] =
        json!({"app": "ztunnel", "istio.io/dataplane-mode": "none", "controller-revision-hash": "6c9d8f7b5"});
    pod["metadata"]["ownerReferences"][0]["kind"] = json!("DaemonSet");
    pod["metadata"]["ownerReferences"][0]["name"] = json!("ztunnel");
    pod
}

pub(crate) fn namespace(name: &str) -> Value {
    let mode = if name == "istio-system" { "none" } else { "ambient" };
    json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": name, "creationTimestamp": TIME, "labels": {"kubernetes.io/metadata.name": name, "istio.io/dataplane-mode": mode}},
        "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"},
    })
}

pub(crate) fn node(name: &str) -> Value {
    let images: Vec<Value> = (0..40)
        .map(|n| json!({"names": [format!("registry.example.com/shop/image-{n}@sha256:6f1e0c7b0a5d4c3b2a19f8e7d6c5b4a3928170605f4e3d2c1b0a998877665544"), format!("registry.example.com/shop/image-{n}:2026.11.3")], "sizeBytes": 87_654_321 + n}))
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "creationTimestamp": TIME, "labels": {
            "kubernetes.io/arch": "amd64", "kubernetes.io/hostname": name, "kubernetes.io/os": "linux",
            "node.kubernetes.io/instance-type": "m6i.4xlarge",
            "topology.kubernetes.io/region": "eu-central-1", "topology.kubernetes.io/zone": "eu-central-1a",
        }},
        "spec": {"podCIDR": "10.64.0.0/24", "podCIDRs": ["10.64.0.0/24"]},
        "status": {
            "capacity": {"cpu": "16", "memory": "65536Mi", "pods": "250"}, "images": images,
            "conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": TIME, "lastTransitionTime": TIME, "reason": "KubeletReady", "message": "kubelet is posting ready status"}],
            "nodeInfo": {"architecture": "amd64", "operatingSystem": "linux", "kernelVersion": "6.12.0", "kubeletVersion": "v1.34.2", "containerRuntimeVersion": "containerd://2.1.4"},
        },
    })
}

pub(crate) fn service(namespace: &str, app: &str, address: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": app, "namespace": namespace, "creationTimestamp": TIME, "labels": labels(app),
            "annotations": {"meta.helm.sh/release-name": app, "meta.helm.sh/release-namespace": namespace},
            "managedFields": [{"manager": "helm", "operation": "Update", "apiVersion": "v1", "time": TIME, "fieldsType": "FieldsV1", "fieldsV1": {
                "f:metadata": {"f:annotations": {".": {}, "f:meta.helm.sh/release-name": {}, "f:meta.helm.sh/release-namespace": {}}, "f:labels": {".": {}, "f:app": {}}},
                "f:spec": {"f:internalTrafficPolicy": {}, "f:ports": {".": {}, "k:{\"port\":80,\"protocol\":\"TCP\"}": {".": {}, "f:name": {}, "f:port": {}, "f:protocol": {}, "f:targetPort": {}}}, "f:selector": {}, "f:sessionAffinity": {}, "f:type": {}},
            }}]},
        "spec": {
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": "http"}],
            "selector": {"app.kubernetes.io/name": app, "app.kubernetes.io/instance": app},
            "clusterIP": address, "clusterIPs": [address], "type": "ClusterIP", "sessionAffinity": "None",
            "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack", "internalTrafficPolicy": "Cluster",
        },
        "status": {"loadBalancer": {}},
    })
}

pub(crate) struct Endpoint {
    pub(crate) name: String,
    pub(crate) address: String,
    pub(crate) node: String,
    pub(crate) uid: String,
}

pub(crate) fn slice(namespace: &str, app: &str, endpoints: &[Endpoint]) -> Value {
    let endpoints: Vec<Value> = endpoints
        .iter()
        .map(|Endpoint { name, address, node, uid }| {
            json!({
                "addresses": [address], "conditions": {"ready": true, "serving": true, "terminating": false},
                "targetRef": {"kind": "Pod", "namespace": namespace, "name": name, "uid": uid},
                "nodeName": node, "zone": "eu-central-1a",
            })
        })
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": format!("{app}-x7k2p"), "generateName": format!("{app}-"), "namespace": namespace, "creationTimestamp": TIME,
            "labels": {"endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io", "kubernetes.io/service-name": app},
            "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": TIME},
            "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": app, "uid": "b0f1", "controller": true, "blockOwnerDeletion": true}]},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": endpoints,
    })
}

pub(crate) fn policy(namespace: &str) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "callers", "namespace": namespace, "creationTimestamp": TIME},
        "spec": {"action": "ALLOW", "rules": [
            {"from": [{"source": {"namespaces": [namespace, "ingress"]}}], "to": [{"operation": {"ports": ["8080"]}}]},
            {"from": [{"source": {"principals": ["cluster.local/ns/observability/sa/prometheus"]}}], "to": [{"operation": {"ports": ["9090"]}}]},
        ]},
    })
}

pub(crate) fn strict(namespace: &str) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {"name": "default", "namespace": namespace, "creationTimestamp": TIME},
        "spec": {"mtls": {"mode": "STRICT"}},
    })
}
