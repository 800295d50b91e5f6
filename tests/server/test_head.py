import pytest
from starlette.testclient import TestClient


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/livez", "/readyz", "/model", "/metrics", "/sample.jpg", "/openapi.json"]
)
def test_head_is_answered_as_get_without_a_body(client: TestClient, path: str) -> None:
    got, asked = client.get(path), client.head(path)
    assert asked.status_code == got.status_code == 200
    assert asked.content == b""
    assert asked.headers["content-type"] == got.headers["content-type"]


def test_where_there_is_no_get_there_is_no_head(client: TestClient) -> None:
    refused = client.head("/detect")
    assert refused.status_code == 405
    assert client.head("/nowhere").status_code == 404


def test_the_request_is_counted_under_its_route(client: TestClient) -> None:
    client.head("/readyz")
    assert 'ddetr_requests_total{route="/readyz",status="200"} 1.0' in client.get("/metrics").text
