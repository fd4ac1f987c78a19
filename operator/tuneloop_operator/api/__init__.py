"""The schema of Tuneloop's kinds: pydantic models here, CRDs and documentation generated from them."""

GROUP = "tuneloop.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
