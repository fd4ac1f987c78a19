{{/* Name of everything that the chart makes: the release's, with "tuneloop" in it. */}}
{{- define "tuneloop.name" -}}
{{- if contains "tuneloop" .Release.Name -}}
{{- .Release.Name | trunc 48 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-tuneloop" .Release.Name | trunc 48 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "tuneloop.operator" -}}
{{ include "tuneloop.name" . }}-operator
{{- end -}}

{{- define "tuneloop.selector" -}}
app.kubernetes.io/name: tuneloop
app.kubernetes.io/component: operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Not managed-by: tuneloop, which says that the operator made an object. */}}
{{- define "tuneloop.labels" -}}
{{ include "tuneloop.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "tuneloop.hasMonitoring" -}}
{{- if and .Values.monitoring.enabled (.Capabilities.APIVersions.Has "monitoring.coreos.com/v1") -}}true{{- end -}}
{{- end -}}

{{/* Where the pods are that the operator makes. */}}
{{- define "tuneloop.watched" -}}
{{- if .Values.watchNamespaces -}}
namespaceSelector:
  matchNames: {{ toJson .Values.watchNamespaces }}
{{- else -}}
namespaceSelector:
  any: true
{{- end -}}
{{- end -}}
