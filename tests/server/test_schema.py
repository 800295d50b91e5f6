from starlette.testclient import TestClient

from server.errors import ServiceError


def test_the_examples_of_classes_are_the_models_own(client: TestClient) -> None:
    detect = client.get("/openapi.json").json()["paths"]["/detect"]["post"]
    classes = next(parameter for parameter in detect["parameters"] if parameter["name"] == "classes")
    assert classes["schema"] == {"type": "string", "examples": ["red,green"]}


def test_every_code_of_an_error_is_named(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    codes = schemas["ErrorDetail"]["properties"]["code"]["enum"]
    kinds = [ServiceError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert codes == sorted({kind.code for kind in kinds})
    assert {"image_mislabelled", "too_many_pixels", "queue_full"} <= set(codes)


def test_who_is_told_to_come_again_is_told_when(client: TestClient) -> None:
    responses = client.get("/openapi.json").json()["paths"]["/detect"]["post"]["responses"]
    assert [status for status in responses if "Retry-After" in responses[status].get("headers", {})] == ["429", "503"]


def test_what_a_request_may_not_have_is_said(client: TestClient) -> None:
    content = client.get("/openapi.json").json()["paths"]["/detect"]["post"]["requestBody"]["content"]
    for media_type in ("application/json", "multipart/form-data"):
        assert content[media_type]["schema"]["additionalProperties"] is False
        assert content[media_type]["schema"]["properties"]["images"]["maxItems"] == 32
    assert content["application/json"]["schema"]["properties"]["images"]["items"]["additionalProperties"] is False
