{{/* global.platform; GKE is recognised by its version. */}}
{{- define "fairway.platform" -}}
{{- if .Values.global.platform }}{{ .Values.global.platform }}{{ else if contains "-gke" .Capabilities.KubeVersion.Version }}gke{{ end }}
{{- end }}

{{/* fairway.setting (list $ "cni" "cniBinDir" DEFAULT): the user's value, else the platform's, else DEFAULT; as JSON. */}}
{{- define "fairway.setting" -}}
{{- $ := index . 0 -}}{{- $section := index . 1 -}}{{- $key := index . 2 -}}
{{- $platforms := $.Files.Get "files/platforms.yaml" | fromYaml -}}
{{- $profile := dig (include "fairway.platform" $ | default "none") $section dict $platforms -}}
{{- $own := index $.Values $section $key -}}
{{- if not (kindIs "invalid" $own) }}{{ toJson $own }}
{{- else if hasKey $profile $key }}{{ toJson (index $profile $key) }}
{{- else }}{{ toJson (index . 3) }}{{ end }}
{{- end }}

{{/* fairway.image (list $ .Values.ztunnel) */}}
{{- define "fairway.image" -}}
{{- $global := (index . 0).Values.global -}}{{- $own := index . 1 -}}
{{- if contains "/" $own.image }}{{ $own.image }}
{{- else }}{{ $own.hub | default $global.hub }}/{{ $own.image }}:{{ $own.tag | default $global.tag | default (index . 0).Chart.AppVersion }}{{ end }}
{{- end }}

{{/* fairway.labels (list $ "ztunnel"): of every object of a component. */}}
{{- define "fairway.labels" -}}
{{- $ := index . 0 -}}
app.kubernetes.io/name: {{ index . 1 }}
app.kubernetes.io/instance: {{ $.Release.Name }}
app.kubernetes.io/managed-by: {{ $.Release.Service }}
app.kubernetes.io/part-of: fairway
app.kubernetes.io/version: {{ $.Chart.AppVersion | quote }}
helm.sh/chart: {{ $.Chart.Name }}-{{ $.Chart.Version }}
{{- end }}

{{/* fairway.podLabels (list $ "ztunnel"): the same under every chart version, so that only what changes a component restarts it. Pods of
the mesh itself are neither captured nor injected. */}}
{{- define "fairway.podLabels" -}}
app.kubernetes.io/name: {{ index . 1 }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/part-of: fairway
istio.io/dataplane-mode: none
sidecar.istio.io/inject: "false"
{{- end }}

{{- define "fairway.scrape" -}}
prometheus.io/scrape: "true"
prometheus.io/path: /metrics
prometheus.io/port: {{ . | quote }}
{{- end }}

{{/* fairway.env DICT: as entries of a container's env. */}}
{{- define "fairway.env" -}}
{{- range $name, $value := . -}}
- name: {{ $name }}
  value: {{ $value | quote }}
{{ end }}
{{- end }}

{{- define "fairway.pullSecrets" -}}
{{- with .Values.global.imagePullSecrets -}}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* Where proxies find discovery and the CA. */}}
{{- define "fairway.discovery" -}}
{{- if .Values.controlPlane.enabled -}}
https://fairwayd.{{ .Release.Namespace }}.svc:15012
{{- else -}}
https://istiod.{{ .Values.ztunnel.istioNamespace | default .Release.Namespace }}.svc:15012
{{- end -}}
{{- end }}

{{- define "fairway.logFormat" -}}
{{ ternary "json" "plain" .Values.global.logAsJson }}
{{- end }}

{{- define "fairway.trustDomain" -}}
{{ .Values.meshConfig.trustDomain | default "cluster.local" }}
{{- end }}

{{/* fairway.address (list $ PORT): to listen on everywhere. */}}
{{- define "fairway.address" -}}
{{ ternary "[::]" "0.0.0.0" (index . 0).Values.global.ipv6 }}:{{ index . 1 }}
{{- end }}

{{/* What of the agent's settings a platform may change, as YAML. */}}
{{- define "fairway.nodeSettings" -}}
{{- range $key, $usual := dict "cniBinDir" "/opt/cni/bin" "cniConfDir" "/etc/cni/net.d" "cniConfFileName" "" "cniNetnsDir" "/var/run/netns" "chained" true "provider" "default" "seLinuxOptions" dict }}
{{ $key }}: {{ include "fairway.setting" (list $ "cni" $key $usual) }}
{{- end }}
{{- end }}

{{/* The agent's environment that is the same on every node. */}}
{{- define "fairway.nodeConfig" -}}
{{- $own := .Values.cni -}}{{- $setting := include "fairway.nodeSettings" . | fromYaml -}}
EXCLUDE_NAMESPACES: {{ $own.excludeNamespaces | join "," | quote }}
AMBIENT_DNS_CAPTURE: {{ $own.ambient.dnsCapture | quote }}
AMBIENT_IPV6: {{ and $own.ambient.ipv6 .Values.global.ipv6 | quote }}
CHAINED_CNI_PLUGIN: {{ $setting.chained | quote }}
{{- with $setting.cniConfFileName }}
CNI_CONF_NAME: {{ . | quote }}
{{- end }}
ISTIO_OWNED_CNI_CONFIG: {{ $own.istioOwnedCNIConfig | quote }}
{{- if $own.istioOwnedCNIConfig }}
ISTIO_OWNED_CNI_CONF_FILENAME: {{ $own.istioOwnedCNIConfigFileName | quote }}
{{- end }}
FAIRWAY_ADMIN_ADDR: {{ include "fairway.address" (list $ 15014) | quote }}
FAIRWAY_HEALTH_ADDR: {{ include "fairway.address" (list $ 8000) | quote }}
{{- if $own.taint.enabled }}
FAIRWAY_TAINT: cni.istio.io/not-ready
{{- end }}
RUST_LOG: {{ $own.logging.level | quote }}
LOG_FORMAT: {{ include "fairway.logFormat" . | quote }}
{{- end }}
