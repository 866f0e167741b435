"""Jobs on Kubernetes: renders, validates and submits KubeRay manifests."""
