"""The security rules of docs/serving.md, one by one."""

import ssl
import stat
import threading

import httpx2 as httpx
import pytest
import trustme

from jpaged.errors import InvalidConfigError
from jpaged.server.app import make_app
from jpaged.server.config import ServerConfig
from jpaged.server.lifecycle import bind
from tests.server.support import serving

ADMIN = ("/reset_prefix_cache", "/pause", "/resume", "/abort_requests")


def test_default_host():
    sock = bind(ServerConfig(port=0))
    assert sock.getsockname()[0] == "127.0.0.1"
    sock.close()


def test_unix_socket(tmp_path):
    path = tmp_path / "s"
    for _ in range(2):  # the second time one is left over
        bind(ServerConfig(uds=str(path))).close()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InvalidConfigError, match="can't listen"):
        bind(ServerConfig(uds=str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "precious"


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def certificate(authority, tmp_path):
    """The files of a certificate for 127.0.0.1: (certificate, key)."""
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    return str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")


def test_tls(tiny, authority, certificate):
    certfile, keyfile = certificate
    with serving(tiny(), ssl_certfile=certfile, ssl_keyfile=keyfile) as live:
        assert live.url.startswith("https://")
        trusting = ssl.create_default_context()
        authority.configure_trust(trusting)
        with httpx.Client(base_url=live.url, verify=trusting) as client:
            body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 3}
            assert client.post("/v1/completions", json=body).status_code == 200
        with httpx.Client(base_url=live.url) as stranger, pytest.raises(httpx.ConnectError):
            stranger.get("/health")
        with pytest.raises(httpx.HTTPError):
            httpx.get(live.url.replace("https", "http") + "/health")


def test_certificates_that_can_not_be_used(certificate, tmp_path):
    certfile, keyfile = certificate
    other = trustme.CA().issue_cert("127.0.0.1").private_key_pem
    other.write_to_path(tmp_path / "other.pem")
    (tmp_path / "empty.pem").write_text("")
    for files in (
        (certfile, str(tmp_path / "other.pem")),
        (certfile, str(tmp_path / "empty.pem")),
        (str(tmp_path / "empty.pem"), keyfile),
        (str(tmp_path / "nothing.pem"), keyfile),
    ):
        with pytest.raises(InvalidConfigError, match="can't use ssl_certfile"):
            bind(ServerConfig(port=0, ssl_certfile=files[0], ssl_keyfile=files[1]))
    with pytest.raises(InvalidConfigError, match="needs both"):
        ServerConfig(ssl_certfile=certfile)


def test_every_path_but_health_is_guarded(tiny, monkeypatch):
    monkeypatch.setenv("JPAGED_API_KEY", "third, fourth")
    settings = {"api_key": ("first", "second"), "enable_admin_endpoints": True, "enable_ui": True}
    settings["allowed_origins"] = ("http://page",)
    with serving(tiny(), key="first", **settings) as live:
        stranger = httpx.Client(base_url=live.url)
        assert stranger.get("/health").status_code == 200
        paths = [path for path in live.http.get("/openapi.json").json()["paths"] if path != "/health"]
        assert len(paths) >= 16
        for path in [*paths, "/docs", "/openapi.json", "/nothing", "/health/", "//health", "/HEALTH"]:
            for method in ("GET", "POST"):
                answer = stranger.request(method, path)
                assert answer.status_code == 401, path
                assert answer.json()["error"]["code"] == "invalid_api_key"
        for key in ("firs", "firstt", "FIRST", "first,second", "first second", "é"):
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert stranger.get("/version", headers=headers).status_code == 401
        assert stranger.get("/version", headers={"Authorization": "first"}).status_code == 401
        assert stranger.get("/version", headers={"Authorization": "Basic first"}).status_code == 401
        for key in ("first", "second", "third", "fourth"):
            assert stranger.get("/version", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        ask = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
        assert stranger.options("/v1/models", headers=ask).headers["access-control-allow-origin"] == "http://page"
        ask["Origin"] = "http://other"
        assert "access-control-allow-origin" not in stranger.options("/v1/models", headers=ask).headers
        stranger.close()


def test_admin_endpoints_are_off(live):
    for path in ADMIN:
        assert live.http.post(path).status_code == 404


def test_admin_endpoints(tiny):
    with serving(tiny(), enable_admin_endpoints=True) as live:
        assert live.post("/pause").status_code == 200
        answers = []

        def ask(request_id):
            body = {"prompt": "a", "max_tokens": 4, "request_id": request_id}
            answers.append((request_id, live.post("/v1/completions", **body).status_code))

        threads = [threading.Thread(target=ask, args=(name,)) for name in ("one", "two")]
        for thread in threads:
            thread.start()
        while live.llm.num_unfinished_requests < 2:
            pass
        assert live.http.get("/health").status_code == 200
        assert live.post("/abort_requests", request_ids=["cmpl-one"]).status_code == 200
        threads[0].join()
        assert live.post("/resume").status_code == 200
        threads[1].join()
        assert answers == [("one", 503), ("two", 200)]
        assert live.post("/reset_prefix_cache").status_code == 200


def test_tokenising_leaves_the_event_loop_free(tiny):
    """While a text is tokenised, and for as long as that takes, the server answers."""
    engine = tiny()
    with serving(engine, max_body_bytes=64 << 20) as live:
        begun, go_on = threading.Event(), threading.Event()
        in_worker = live.llm.in_worker

        async def slow(function, *arguments):
            def wait():
                begun.set()
                go_on.wait()
                return function(*arguments)

            return await in_worker(wait)

        live.llm.in_worker = slow
        answers = []
        thread = threading.Thread(target=lambda: answers.append(live.post("/tokenize", prompt="a").status_code))
        thread.start()
        begun.wait()
        assert httpx.get(f"{live.url}/health").status_code == 200
        assert answers == []
        go_on.set()
        thread.join()
        assert answers == [200]


def test_request_ids(tiny):
    with serving(tiny(), enable_request_id_headers=True) as live:
        assert live.http.get("/version", headers={"X-Request-Id": "mine"}).headers["x-request-id"] == "mine"
        for odd in ("a" * 200, ""):
            given = live.http.get("/version", headers={"X-Request-Id": odd}).headers["x-request-id"]
            assert len(given) == 32


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000},
        {"shutdown_timeout": -1},
        {"enable_auto_tool_choice": True},
        {"ssl_keyfile": "k"},
        {"api_key": ("",)},
        {"max_logprobs": 21},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(InvalidConfigError):
        ServerConfig(**wrong)


def test_a_chat_template_that_is_not_there(live):
    with pytest.raises(InvalidConfigError, match="chat_template"):
        make_app(live.llm, ServerConfig(chat_template="/no/such/file"))


def test_pages_of_allowed_origins_alone_may_call(tiny):
    def asked(live, origin):
        headers = {"origin": origin, "access-control-request-method": "POST"}
        answer = live.http.request("OPTIONS", "/v1/completions", headers=headers)
        return answer.status_code, answer.headers.get("access-control-allow-origin")

    with serving(tiny(), key="k", api_key=("k",), allowed_origins=("http://a.example",)) as live:
        assert asked(live, "http://a.example") == (200, "http://a.example")
        assert asked(live, "http://b.example") == (400, None)
    with serving(tiny()) as live:
        assert asked(live, "http://a.example") == (405, None)
