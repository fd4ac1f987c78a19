"""Types shared by the kinds: sources, references, pod overrides, numbers as strings, conditions."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class Model(BaseModel):
    """Frozen and camelCase at the edge. Unknown fields are ignored here: the API server has pruned or refused them."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=to_camel, populate_by_name=True, serialize_by_alias=True)


def rules(*pairs: tuple[str, str]) -> dict[str, Any]:
    """CEL rules as (expression, message) pairs, for `json_schema_extra`."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in pairs]}


SENTENCE = "x-tuneloop-sentence"
"""What the user reads where a string does not match its `pattern`; the CRD gets a CEL rule instead of the pattern."""
RANGE = "x-tuneloop-range"
"""A CEL expression that must hold beside the pattern, under the same sentence."""


def sentence(text: str, range_: str | None = None) -> dict[str, Any]:
    """For `json_schema_extra` of a string with a pattern."""
    return {SENTENCE: text} if range_ is None else {SENTENCE: text, RANGE: range_}


def keyed_by(*keys: str) -> dict[str, Any]:
    """For `json_schema_extra` of a list whose items are told apart by these fields (server-side apply merges them)."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)}


NUMBER_PATTERN = r"^[0-9]+(\.[0-9]+)?([eE]-?[0-9]+)?$"


def decimal(says: str, rule: str | None = None) -> Any:
    """A decimal as a string, since Kubernetes tools mangle floats: the sentence that a user sees, and the bound in CEL."""
    return Field(pattern=NUMBER_PATTERN, max_length=16, json_schema_extra=sentence(says, rule) if rule else sentence(says))


Number = Annotated[str, decimal("must be a number of at least 0, as a string, for example '0.5'.")]
"""A non-negative decimal as a string, since Kubernetes tools mangle floats."""
Positive = Annotated[str, decimal("must be a number above 0, as a string, for example '0.5' or '2e-4'.", "double(self) > 0.0")]
Share = Annotated[str, decimal("must be a number from 0 to 1, as a string, for example '0.5'.", "double(self) <= 1.0")]
Half = Annotated[str, decimal("must be a number from 0 to 0.5, as a string, for example '0.1'.", "double(self) <= 0.5")]
DNS_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
Name = Annotated[
    str,
    Field(
        pattern=DNS_LABEL,
        min_length=1,
        max_length=52,
        json_schema_extra=sentence("must be a name: only a-z, 0-9 and '-', beginning and ending with a letter or digit."),
    ),
]
"""A DNS label short enough that child names fit."""
SecretName = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$",
        min_length=1,
        max_length=253,
        json_schema_extra=sentence("must be the name of a Secret: only a-z, 0-9, '-' and '.'."),
    ),
]


class SecretRef(Model):
    """A Secret of the same namespace."""

    name: SecretName = Field(description="Name of a Secret in the same namespace.")


SOURCE_RULES = rules(
    (
        "self.uri.startsWith('pvc://') || self.uri.startsWith('hf://')",
        "uri must start with pvc:// (pvc://claim/path) or hf:// (hf://organisation/name).",
    ),
    ("!self.uri.contains('..')", "uri must not contain '..'."),
    (
        "!self.uri.startsWith('pvc://') || self.uri.matches('^pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/.*)?$')",
        "uri must name a claim: pvc://claim/path.",
    ),
)


Digest = Annotated[
    str, Field(pattern=r"^sha256:[0-9a-f]{64}$", max_length=80, json_schema_extra=sentence("must be sha256: and 64 hexadecimal digits."))
]


class Source(Model):
    """Where bytes are read: a path on a claim, or a repository of the Hugging Face hub."""

    model_config = ConfigDict(json_schema_extra=SOURCE_RULES)

    uri: str = Field(min_length=7, max_length=512, description="pvc://claim/path, or hf://organisation/name.")
    revision: str | None = Field(
        default=None, max_length=64, description="Commit of a hub repository. Resolved once, and pinned in status, if absent."
    )
    secret_ref: SecretRef | None = Field(default=None, description="Secret with the key `token`, for a hub repository that needs one.")


ClaimFolder = Annotated[
    str,
    Field(
        pattern=r"^pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[A-Za-z0-9._-]+)*$",
        max_length=256,
        json_schema_extra=sentence("must be pvc://claim or pvc://claim/folder, without '..'.", "!self.contains('..')"),
    ),
]


class StoreRef(Model):
    """A claim (and a folder on it) that models are written to."""

    uri: ClaimFolder = Field(
        description="pvc://claim or pvc://claim/folder. All stages and engines mount it: ReadWriteMany on more than one node."
    )


class ModelRef(Model):
    """A model by name; without a version the newest approved one."""

    name: Name = Field(description="The model's name: `output.model` of the job that trained it.")
    version: int | None = Field(
        default=None, ge=1, description="A ModelVersion's number. Absent: the highest approved version not rejected here."
    )


class Toleration(Model):
    """As in a pod."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.operator) || self.operator != 'Exists' || !has(self.value) || self.value == ''",
                "a toleration with operator Exists takes no value.",
            )
        )
    )

    key: str | None = Field(default=None, max_length=316, description="Taint key.")
    operator: Literal["Exists", "Equal"] | None = Field(default=None, description="Exists: any value. Equal: this value.")
    value: str | None = Field(default=None, max_length=63, description="Taint value.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(default=None, description="Absent: all effects.")
    toleration_seconds: int | None = Field(default=None, ge=0, description="For NoExecute: how long the pod stays.")


Quantity = Annotated[
    str,
    Field(
        pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$",
        max_length=24,
        json_schema_extra=sentence("must be a quantity, for example 500m, 2 or 8Gi."),
    ),
]


class Resources(Model):
    """Requests and limits by resource name."""

    requests: Annotated[dict[str, Quantity], Field(max_length=16)] = Field(default={}, description="As in a container.")
    limits: Annotated[dict[str, Quantity], Field(max_length=16)] = Field(default={}, description="As in a container.")


class EnvVar(Model):
    """A plain value; secrets go into Secrets."""

    name: str = Field(
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        max_length=128,
        description="Name of the variable.",
        json_schema_extra=sentence("must be the name of an environment variable: letters, digits and '_', not beginning with a digit."),
    )
    value: str = Field(default="", max_length=4096, description="Its value.")


LabelValue = Annotated[
    str,
    Field(
        json_schema_extra={
            "maxLength": 63,
            **rules(
                (
                    "self.matches('^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$')",
                    "must be a label's value: letters, digits, '-', '_' and '.', beginning and ending with a letter or digit.",
                )
            ),
        }
    ),
]
"""Of the schema alone, as are object names below: an older object that breaks the rule is still read, and what refuses its pod is told."""
ObjectName = Annotated[
    str,
    Field(
        json_schema_extra={
            "maxLength": 253,
            **rules(
                (
                    "self.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$')",
                    "must be the name of an object: only a-z, 0-9, '-' and '.', beginning and ending with a letter or digit.",
                )
            ),
        }
    ),
]


class PodOverrides(Model):
    """What a user may change of a pod that the operator makes: an allow-list. Maps merge by key, lists append."""

    labels: Annotated[dict[str, LabelValue], Field(max_length=32)] = Field(
        default={}, description="Added to the pod; labels of the operator win."
    )
    annotations: Annotated[dict[str, Annotated[str, Field(max_length=1024)]], Field(max_length=32)] = Field(
        default={}, description="Added to the pod."
    )
    node_selector: Annotated[dict[str, LabelValue], Field(max_length=16)] = Field(default={}, description="As in a pod.")
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=16)] = Field(default=(), description="As in a pod.")
    priority_class_name: ObjectName | None = Field(default=None, description="As in a pod.")
    runtime_class_name: ObjectName | None = Field(default=None, description="As in a pod.")
    scheduler_name: ObjectName | None = Field(default=None, description="As in a pod.")
    image_pull_secrets: Annotated[tuple[SecretRef, ...], Field(max_length=8)] = Field(default=(), description="As in a pod.")
    resources: Resources | None = Field(default=None, description="Merged over the operator's defaults.")
    env: Annotated[tuple[EnvVar, ...], Field(max_length=32)] = Field(
        default=(), description="Appended; names that the operator sets keep its value.", json_schema_extra=keyed_by("name")
    )


class ConditionStatus(StrEnum):
    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(Model):
    """The standard condition."""

    type: str = Field(max_length=64, description="What is claimed.")
    status: ConditionStatus = Field(description="True, False or Unknown.")
    reason: str = Field(max_length=64, description="One word for programs.")
    message: str = Field(default="", max_length=1024, description="One sentence for people, with what to do.")
    observed_generation: int = Field(default=0, description="The generation that this was said of.")
    last_transition_time: str = Field(default="", max_length=32, description="When status last changed.")


class Metadata(Model):
    """What the operator reads of an object's metadata."""

    name: str
    namespace: str = ""
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    creation_timestamp: str = ""
    deletion_timestamp: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
