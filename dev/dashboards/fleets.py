"""All deployments at a glance; and feedback and drift."""

from __future__ import annotations

from dev.dashboards.panels import Dashboard, Panel, Row
from dev.dashboards.queries import ALWAYS, FIRST_BYTE, HERE, NAMED, ONE, RATE, THUMBS_DOWN, WHICH, chosen, failing, quantile, rate

FLEET = Dashboard(
    "fleet",
    "fleet",
    (
        Row(
            "Models",
            (
                Panel(
                    "Deployments",
                    "ModelDeployments by state.",
                    ((f"sum by (state) (max by (namespace, state) (tuneloop_operator_modeldeployments{HERE}))", "{{state}}"),),
                    width=6,
                    kind="stat",
                ),
                Panel(
                    "Serving version",
                    "The version that takes the traffic.",
                    ((f"max by (namespace, name) (tuneloop_operator_modeldeployment_version{NAMED})", "{{namespace}}/{{name}}"),),
                    width=6,
                    kind="stat",
                ),
                Panel(
                    "Drift alarm",
                    "1: what users send has changed.",
                    ((f"max by ({ONE}) ({chosen('tuneloop_drift_alarm')}) or {ALWAYS}", WHICH),),
                    width=6,
                    kind="stat",
                ),
                Panel(
                    "Jobs",
                    "FineTuneJobs by phase.",
                    ((f"sum by (phase) (max by (namespace, phase) (tuneloop_operator_finetunejobs{HERE}))", "{{phase}}"),),
                    width=6,
                    kind="stat",
                ),
                Panel("Requests", "Answered requests a second.", ((rate("tuneloop_gateway_requests_total", ONE), WHICH),), "reqps"),
                Panel(
                    "Failing share",
                    "Requests that ended with a 5xx; 5 % for ten minutes is an alert.",
                    ((failing(ONE), WHICH),),
                    "percentunit",
                ),
                Panel("Time to first byte, p95", "From arrival at the gateway.", ((quantile(0.95, FIRST_BYTE, ONE), WHICH),), "s"),
                Panel(
                    "Tokens",
                    "Of prompts and answers, a second, as the engines report them.",
                    ((rate("tuneloop_gateway_tokens_total", f"{ONE}, kind"), f"{WHICH} {{{{kind}}}}"),),
                ),
                Panel(
                    "Waiting in engines",
                    "Requests that no engine has begun.",
                    ((f"sum by ({ONE}) ({chosen('vllm:num_requests_waiting')})", WHICH),),
                ),
                Panel(
                    "KV cache",
                    "Of the fullest engine of each deployment; above 95 % requests queue.",
                    ((f"max by ({ONE}) ({chosen('vllm:kv_cache_usage_perc')})", WHICH),),
                    "percentunit",
                    most=1,
                ),
            ),
        ),
        Row(
            "Operator",
            (
                Panel("Leader", "1: a replica holds the Lease.", (("sum(tuneloop_operator_leader)", "leading"),), width=4, kind="stat"),
                Panel(
                    "Watches",
                    "Seconds since each watch's last sign of life; 180 is an alert.",
                    (("max by (kind) (tuneloop_operator_watch_age_seconds)", "{{kind}}"),),
                    "s",
                    width=10,
                ),
                Panel(
                    "Errors",
                    "Passes that failed, a second.",
                    ((f"sum by (class) (rate(tuneloop_operator_errors_total{RATE})) or 0 * sum(tuneloop_operator_leader)", "{{class}}"),),
                    width=10,
                ),
            ),
        ),
    ),
)

WATCHING = Dashboard(
    "feedback",
    "feedback and drift",
    (
        Row(
            "Drift",
            (
                Panel(
                    "Evidence",
                    "Natural logarithm; an alarm where it reaches the threshold.",
                    (
                        (f"max by ({ONE}) ({chosen('tuneloop_drift_log_evidence')})", f"{WHICH} evidence"),
                        (f"max by ({ONE}) ({chosen('tuneloop_drift_log_threshold')})", f"{WHICH} threshold"),
                    ),
                ),
                Panel(
                    "Size",
                    "Prequential AUC above one half: how well new inputs are told from the reference.",
                    ((f"max by ({ONE}) ({chosen('tuneloop_drift_effect')})", WHICH),),
                    most=0.5,
                ),
                Panel(
                    "Reference and pairs",
                    "Rows not used yet, and pairs tested since the epoch began.",
                    (
                        (f"max by ({ONE}) ({chosen('tuneloop_drift_reference_remaining_rows')})", f"{WHICH} rows left"),
                        (f"max by ({ONE}) ({chosen('tuneloop_drift_pairs')})", f"{WHICH} pairs"),
                    ),
                ),
                Panel(
                    "Training-serving skew",
                    "Evidence that live inputs are unlike those of the training, beside its threshold.",
                    (
                        (f"max by ({ONE}) ({chosen('tuneloop_skew_log_evidence')}) or {ALWAYS}", f"{WHICH} evidence"),
                        (f"max by ({ONE}) ({chosen('tuneloop_skew_log_threshold')}) or {ALWAYS}", f"{WHICH} threshold"),
                    ),
                ),
                Panel(
                    "Alarms",
                    "1 from the alarm on, until another version takes over.",
                    (
                        (f"max by ({ONE}) ({chosen('tuneloop_drift_alarm')})", f"{WHICH} drift"),
                        (f"max by ({ONE}) ({chosen('tuneloop_skew_detected')}) or {ALWAYS}", f"{WHICH} skew"),
                    ),
                    most=1,
                ),
                Panel(
                    "Retrainings",
                    "By outcome.",
                    (
                        (
                            f"sum by (namespace, name, outcome) (max by (namespace, name, outcome) (tuneloop_operator_retrainings{NAMED}))",
                            "{{name}} {{outcome}}",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Feedback",
            (
                Panel(
                    "Feedback",
                    "A second, by kind and value.",
                    ((rate("tuneloop_feedback_total", f"{ONE}, kind, value"), f"{WHICH} {{{{kind}}}} {{{{value}}}}"),),
                ),
                Panel(
                    "Thumbs down",
                    "Share of the ratings.",
                    (
                        (
                            THUMBS_DOWN,
                            WHICH,
                        ),
                    ),
                    "percentunit",
                ),
                Panel(
                    "Labelled rows",
                    "Curated rows of the epoch: those to train on, and those to gate by.",
                    ((f"max by ({ONE}, split) ({chosen('tuneloop_feedback_labelled_rows')})", f"{WHICH} {{{{split}}}}"),),
                ),
                Panel(
                    "Captured",
                    "Requests stored, and lost, a second.",
                    (
                        (rate("tuneloop_gateway_captured_total", ONE), f"{WHICH} stored"),
                        (rate("tuneloop_gateway_capture_dropped_total", f"{ONE}, reason"), f"{WHICH} lost: {{{{reason}}}}"),
                    ),
                ),
                Panel(
                    "Deleted",
                    "Rows that were past retention, or of somebody who is forgotten, a second.",
                    ((f"{rate('tuneloop_gateway_rows_deleted_total', f'{ONE}, reason')} or {ALWAYS}", f"{WHICH} {{{{reason}}}}"),),
                ),
                Panel(
                    "Requests", "A second: what there is to learn from.", ((rate("tuneloop_gateway_requests_total", ONE), WHICH),), "reqps"
                ),
            ),
        ),
    ),
)
