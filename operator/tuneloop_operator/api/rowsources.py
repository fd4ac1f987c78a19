"""Where rows are read: files of a claim, or objects of a bucket."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from tuneloop_operator.api.types import Model, SecretRef, rules

CLAIM, BUCKET = "pvc://", "s3://"
ROW_SOURCE_RULES = rules(
    (
        "self.uri.startsWith('pvc://') || self.uri.startsWith('s3://')",
        "uri must start with pvc:// (pvc://claim/path) or s3:// (s3://bucket/prefix).",
    ),
    ("!self.uri.contains('..')", "uri must not contain '..'."),
    (
        "!self.uri.startsWith('pvc://') || self.uri.matches('^pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/.*)?$')",
        "uri must name a claim: pvc://claim/path.",
    ),
    (
        "!self.uri.startsWith('s3://') || self.uri.matches('^s3://[a-z0-9][-a-z0-9.]*[a-z0-9](/.*)?$')",
        "uri must name a bucket: s3://bucket/prefix, or s3://bucket/key.",
    ),
    (
        "self.uri.startsWith('s3://') == has(self.secretRef)",
        "s3:// needs secretRef, with the keys to the bucket; rows on a claim have none.",
    ),
)


class RowSource(Model):
    """Files with rows: on a claim, or in a bucket."""

    model_config = ConfigDict(json_schema_extra=ROW_SOURCE_RULES)

    uri: str = Field(
        min_length=7,
        max_length=512,
        description="A file or a folder of files - jsonl, csv (also .gz, .zst), parquet, arrow: pvc://claim/path, or s3://bucket/key or "
        "s3://bucket/prefix, of which the objects directly below are read.",
    )
    secret_ref: SecretRef | None = Field(
        default=None,
        description="s3: a Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, where needed, AWS_ENDPOINT_URL and AWS_REGION.",
    )
