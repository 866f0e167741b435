"""Jobs on Kubernetes: manifests for the KubeRay operator, made from a job and checked offline."""
