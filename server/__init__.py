"""The service: images over HTTP in, boxes out.

An image's way is a straight line, a module a step: admit -> decode -> preprocess -> batch_queue/batcher -> engine ->
postprocess -> respond. `service` runs an image along it, `routes` gives it an HTTP face, `app` wires everything.
Imports neither torch nor onnx.
"""
