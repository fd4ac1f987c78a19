"""Where rows are read: files of a claim, of a bucket, or of a data set on the hub."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from tuneloop_operator.api.types import Model, SecretRef, rules

CLAIM, BUCKET, HUB = "pvc://", "s3://", "hf://"
PLACES = (CLAIM, BUCKET, HUB)
ROW_SOURCE_RULES = rules(
    (
        "['pvc://', 's3://', 'hf://'].exists(p, self.uri.startsWith(p))",
        "uri must start with pvc:// (pvc://claim/path), s3:// (s3://bucket/prefix) or hf:// (hf://organisation/name).",
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
        "!self.uri.startsWith('hf://') || self.uri.matches('^hf://(datasets/)?[A-Za-z0-9][-A-Za-z0-9._]*/[A-Za-z0-9][-A-Za-z0-9._]*(/.*)?$')",
        "uri must name a data set: hf://organisation/name, or hf://organisation/name/path.",
    ),
    ("!self.uri.startsWith('s3://') || has(self.secretRef)", "s3:// needs secretRef, with the keys to the bucket."),
    ("!self.uri.startsWith('pvc://') || !has(self.secretRef)", "secretRef is for s3:// and hf://; a claim needs none."),
    ("!has(self.revision) || self.uri.startsWith('hf://')", "revision is for hf:// alone."),
)


class RowSource(Model):
    """Files with rows: on a claim, in a bucket, or of a data set on the hub."""

    model_config = ConfigDict(json_schema_extra=ROW_SOURCE_RULES)

    uri: str = Field(
        min_length=7,
        max_length=512,
        description="A file or a folder of files - jsonl, csv (also .gz, .zst), parquet, arrow: pvc://claim/path, or s3://bucket/key or "
        "s3://bucket/prefix, of which the objects directly below are read, or hf://organisation/name, with a path to a file, a folder or a "
        "pattern (data/test-*.parquet) where the training split is not meant.",
    )
    revision: str | None = Field(
        default=None, min_length=1, max_length=64, description="Commit or branch on the hub. What was read is pinned in status."
    )
    secret_ref: SecretRef | None = Field(
        default=None,
        description="s3: a Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, where needed, AWS_ENDPOINT_URL and AWS_REGION. "
        "hf: a Secret with the key `token`; absent: that of the base model, where it has one.",
    )
