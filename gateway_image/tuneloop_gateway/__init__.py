"""The gateway: the OpenAI-compatible front of one ModelDeployment, where traffic is routed, captured, judged and watched for drift."""
