"""`make demo`: the whole loop on a real Kubernetes, told as it happens."""

from __future__ import annotations

import sys

from dev.demo.kubectl import CommandFailed, say
from dev.demo.packages import PackageError
from dev.demo.story import DEPLOYMENT, PROMETHEUS, SYSTEM, Scale, Story, StoryFailed, tell

REAL = """What is real: Kubernetes, the operator, the training, vLLM, the gateway, Prometheus; the model, SmolLM2-135M-Instruct, though
de-quantised from 4 bits; the tweets and the review sentences, and the people's scores that are their labels. What is simulated: the
users (texts are sent by this program), the new domain's slang (every sentiment word of the reviews is replaced by a coined one), and
the reviewer (those scores are imported as labels)."""


def main() -> int:
    """0 when the loop closed; 1 with the reason when not. The cluster stays up either way. `CLUSTER=current` is the Makefile's."""
    print(REAL, flush=True)
    story = Story(Scale())
    try:
        tell(story)
    except (StoryFailed, CommandFailed, PackageError, OSError) as error:
        say(f"FAILED: {error}")
        say(f"Look at: kubectl -n {story.space.name} get ftj,mv,mdep,pods; kubectl -n {SYSTEM} logs deployment/tuneloop-operator")
        return 1
    say("The cluster stays up. From here:")
    say('  eval "$(dev/cluster/cluster env)"     kubectl and helm for it;  dev/cluster/cluster down   stops it')
    say(f"  http://{DEPLOYMENT}.{story.space.name}.svc   the model, from pods")
    say(f"  kubectl -n {story.space.name} port-forward service/{DEPLOYMENT} 8000:80   the model, from here")
    if PROMETHEUS:
        say(f"  {PROMETHEUS}   Prometheus")
    return 0


if __name__ == "__main__":
    sys.exit(main())
