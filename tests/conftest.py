"""What holds for all tests, before any library is imported."""

from __future__ import annotations

import os

# As the launcher has it in pods: else the hub's client, once in each process, and TRL with each trainer ask the hub for things of
# their own, over the network, or of the hub that a test plays, which counts what it is asked.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
