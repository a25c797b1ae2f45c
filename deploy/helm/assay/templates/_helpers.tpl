{{- define "assay.labels" -}}
app.kubernetes.io/name: assay
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/version: {{ .root.Values.image.tag | default .root.Chart.AppVersion | trunc 63 | quote }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "assay.selector" -}}
app.kubernetes.io/name: assay
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "assay.image" -}}
{{- $repository := (get .root.Values .component).repository -}}
{{- $tag := .root.Values.image.tag | default .root.Chart.AppVersion -}}
{{- with .root.Values.image.registry }}{{ . }}/{{ end }}{{ $repository }}:{{ $tag }}
{{- end }}

{{/* What the chart sets wins over server.config and agent.config: mounts, probes
and rights go by it. */}}
{{- define "assay.server.config" -}}
{{- $accounts := list (printf "%s/assay-agent" .Release.Namespace) }}
{{- $bundle := printf "%s/assay-bundle" .Release.Namespace }}
{{- $clusters := dict .Values.cluster (dict "agent_service_accounts" $accounts "audience" "assay-server" "bundle_config_map" $bundle) }}
{{- /* In another cluster the chart may be in another namespace. */}}
{{- $others := dict }}
{{- range $name, $_ := .Values.server.otherClusters }}
{{- if eq $name $.Values.cluster }}{{ fail (printf "server.otherClusters has %s, which is this cluster's own name: see cluster" $name) }}{{ end }}
{{- $_ := set $others $name (dict "agent_service_accounts" $accounts "bundle_config_map" $bundle) }}
{{- $_ := set $clusters $name (dict "audience" "assay-server" "kubeconfig" (printf "/etc/assay-server/clusters/%s" $name)) }}
{{- end }}
{{- $default := dict "kubernetes" (dict "clusters" $others) }}
{{- $own := dict
  "trust_domain" .Values.trustDomain
  "seal_key_file" "/etc/assay-server/seal/seal.key"
  "listen" ":8443"
  "admin" (dict "socket" "/var/lib/assay-server/run/admin.sock")
  "metrics" (dict "listen" ":9402")
  "data_dir" "/var/lib/assay-server/data"
  "kubernetes" (dict "clusters" $clusters) }}
{{- with .Values.bootstrap }}{{ $_ := set $own "bootstrap" . }}{{ end }}
{{- if .Values.istio.enabled }}
{{- $mesh := dict "root_config_maps" .Values.istio.rootConfigMaps }}
{{- with .Values.istio.istiodSecret }}{{ $_ := set $mesh "istiod_secret" . }}{{ end }}
{{- with .Values.istio.istiodDNSNames }}{{ $_ := set $mesh "istiod_dns_names" . }}{{ end }}
{{- $istio := dict
  "listen" ":8444"
  "dns_names" (.Values.istio.dnsNames | default (list (printf "assay-server.%s.svc" .Release.Namespace)))
  "trusted_node_accounts" .Values.istio.trustedNodeAccounts
  "clusters" (dict .Values.cluster $mesh) }}
{{- $_ := set $own "istio" $istio }}
{{- end }}
{{- mustMergeOverwrite $default (deepCopy .Values.server.config) $own | toYaml }}
{{- end }}

{{- define "assay.agent.config" -}}
{{- $own := dict
  "trust_domain" .Values.trustDomain
  "server" (dict "addresses" (list (.Values.agent.serverAddress | default (printf "assay-server.%s.svc:8443" .Release.Namespace))))
  "trust_bundle" "/etc/assay-agent/bundle/bundle.crt"
  "k8s_psat" (dict "cluster" .Values.cluster "token_file" "/var/run/secrets/assay/token")
  "sockets" (dict "dir" .Values.agent.socketDir)
  "metrics" (dict "listen" ":9403")
  "attestation" (dict "k8s" (dict "host_cgroups" "/host/sys/fs/cgroup"))
  "data_dir" .Values.agent.dataDir
  "run_dir" (printf "%s/cache" .Values.agent.runDir) }}
{{- /* This one can be set otherwise: a node that is a container itself has no host. */}}
{{- $default := dict "attestation" (dict "require_host_pid" true) }}
{{- mustMergeOverwrite $default (deepCopy .Values.agent.config) $own | toYaml }}
{{- end }}

{{/* Where a pod runs. */}}
{{- define "assay.placement" -}}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
{{- toYaml . | nindent 0 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
