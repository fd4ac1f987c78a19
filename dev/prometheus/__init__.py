"""The local cluster's Prometheus, configured from the monitors in the cluster, as the Prometheus operator does in production."""
