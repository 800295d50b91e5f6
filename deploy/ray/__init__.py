"""The service on a Ray cluster: online as a Serve application, offline over folders of pictures by Ray Data."""
