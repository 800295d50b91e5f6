"""How the service is deployed: container files and manifests, and what runs it on Ray."""
