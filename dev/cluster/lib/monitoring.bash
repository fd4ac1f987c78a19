# Prometheus on the host, configured from the monitors that are in the cluster.

prometheus() {
  local state=$H/prometheus monitors
  mkdir -p "$state/data"
  monitors=(/usr/bin/env PYTHONPATH="$HERE/../.." PYTHONDONTWRITEBYTECODE=1 python3 -m dev.prometheus
    --server "https://127.0.0.1:$API" --pki "$H/pki" --out "$state")
  # What an operator of Prometheus would bring along, so that charts see it.
  kubectl apply --server-side --force-conflicts -f "$HERE/../prometheus/crds.yaml" >/dev/null
  # `kubectl wait` fails at once on a definition that is too new to have conditions.
  await kube-apiserver 30 kubectl wait --for=condition=Established --timeout=10s -f "$HERE/../prometheus/crds.yaml"
  "${monitors[@]}" >"$H/log/prometheus-first.log" 2>&1 ||
    { tail -n 8 "$H/log/prometheus-first.log" >&2; fail "the monitors in the cluster give no configuration"; }
  start prometheus /usr/bin/prometheus --config.file="$state/prometheus.yml" --storage.tsdb.path="$state/data" \
    --storage.tsdb.retention.time=2d --web.listen-address=$PROMETHEUS --log.level=warn
  for_pods prometheus "${PROMETHEUS##*:}"
  alive prometheus && start prometheus-monitors "${monitors[@]}" --prometheus "$H/run/prometheus"
  await prometheus 30 curl -sf http://$PROMETHEUS/-/ready
  say "Prometheus ready: http://$PROMETHEUS"
}
