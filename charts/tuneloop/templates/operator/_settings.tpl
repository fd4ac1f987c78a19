{{/* The environment of the operator: settings.py reads TUNELOOP_*. */}}
{{- define "tuneloop.settings" -}}
- name: TUNELOOP_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- name: TUNELOOP_IDENTITY
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- {name: TUNELOOP_TRAINER_IMAGE, value: {{ .Values.images.trainer | quote }}}
- {name: TUNELOOP_GATEWAY_IMAGE, value: {{ .Values.images.gateway | quote }}}
- {name: TUNELOOP_ENGINE_IMAGE, value: {{ .Values.images.engine | quote }}}
{{- with .Values.images.engineCpu }}
- {name: TUNELOOP_ENGINE_CPU_IMAGE, value: {{ . | quote }}}
{{- end }}
- {name: TUNELOOP_ENGINE_VERSION_FLOOR, value: {{ .Values.engines.versionFloor | quote }}}
- {name: TUNELOOP_VULNERABLE_ENGINES, value: {{ .Values.engines.belowFloor | quote }}}
- {name: TUNELOOP_IMAGE_PULL_POLICY, value: {{ .Values.images.pullPolicy | quote }}}
{{- with .Values.watchNamespaces }}
- {name: TUNELOOP_WATCH_NAMESPACES, value: {{ join "," . | quote }}}
{{- end }}
- {name: TUNELOOP_POD_USER, value: {{ include "tuneloop.numberOrNone" .Values.pods.user | quote }}}
- {name: TUNELOOP_ENGINE_USER, value: {{ include "tuneloop.numberOrNone" .Values.pods.engineUser | quote }}}
- {name: TUNELOOP_FS_GROUP, value: {{ include "tuneloop.numberOrNone" .Values.pods.fsGroup | quote }}}
{{- with .Values.prometheus.url }}
- {name: TUNELOOP_PROMETHEUS_URL, value: {{ . | quote }}}
{{- end }}
{{- if .Values.prometheus.tokenSecret.name }}
- {name: TUNELOOP_PROMETHEUS_TOKEN_FILE, value: /etc/tuneloop/prometheus/token}
{{- end }}
{{- with .Values.operator.device }}
- {name: TUNELOOP_DEVICE, value: {{ . | quote }}}
{{- end }}
{{- if .Values.keda.enabled }}
- {name: TUNELOOP_SCALER_ADDRESS, value: "{{ include "tuneloop.operator" . }}-scaler.{{ .Release.Namespace }}.svc:9090"}
{{- end }}
- {name: TUNELOOP_WORKERS, value: {{ .Values.operator.workers | quote }}}
- {name: TUNELOOP_METRICS_PORT, value: "8080"}
- {name: TUNELOOP_PROGRESS_INTERVAL_SECONDS, value: {{ .Values.operator.progressIntervalSeconds | quote }}}
- {name: TUNELOOP_STATE_INTERVAL_SECONDS, value: {{ .Values.operator.stateIntervalSeconds | quote }}}
{{- end -}}

{{/* Numbers of a values file are floats to Helm; the platform's own choice is written `none`. */}}
{{- define "tuneloop.numberOrNone" -}}
{{- if kindIs "invalid" . -}}none{{- else -}}{{- int64 . -}}{{- end -}}
{{- end -}}
