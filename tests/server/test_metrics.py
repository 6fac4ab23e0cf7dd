"""`GET /metrics` of a real server."""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from streamkv.errors import RateLimitedError
from streamkv.observe.metrics import PREFIXES
from streamkv.sampling_params import SamplingParams
from streamkv.server.limits import Quota
from streamkv.server.principal import Principal
from streamkv.server.routes import Access
from tests.observe.vllm_panels import VLLM_PANELS
from tests.server.serving import Serving, eventually, serving

# What there is nothing of here; docs/observability.md names the panels that stay empty for it.
ABSENT = ("external_prefix_cache_", "mm_cache_", "lora_requests_info", "sleep_mode_operation_", "rl_weight_update_", "estimated_")
ABSENT += ("kv_block_", "num_requests_kv_fetch_by_stage", "nixl_", "kv_offload_", "simple_kv_offload_")
ABSENT += ('prompt_tokens_by_source_total{source="external_kv_transfer"}', "spec_decode_num_accepted_tokens_per_pos_total")
TTFT_BUCKETS = (
    "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0 160.0 640.0 2560.0 +Inf"
)
ITL_BUCKETS = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0 +Inf"
E2E_BUCKETS = "0.3 0.5 0.8 1.0 1.5 2.0 2.5 5.0 10.0 15.0 20.0 30.0 40.0 50.0 60.0 120.0 240.0 480.0 960.0 1920.0 7680.0 +Inf"


async def text_of(served: Serving, **headers: str) -> str:
    async with served.http.get(f"{served.base}/metrics", headers=headers) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        return await answer.text()


async def scraped(served: Serving) -> dict[str, Any]:
    return {family.name: family for family in text_string_to_metric_families(await text_of(served))}


def value(families: dict[str, Any], name: str, **labels: str) -> float:
    family = families.get(name.removesuffix("_total")) or families[name.rsplit("_", 1)[0]]
    (found,) = [s.value for s in family.samples if s.name == name and labels.items() <= s.labels.items()]
    return float(found)


def selected(families: dict[str, Any], series: str) -> list[Any]:
    """The samples that a panel's selector takes."""
    name, _, fixed = series.partition("{")
    labels = dict(re.findall(r'(\w+)="([^"]*)"', fixed))
    names = {name, f"{name}_bucket", f"{name}_sum", f"{name}_count"}
    samples = [sample for family in families.values() for sample in family.samples]
    return [sample for sample in samples if sample.name in names and labels.items() <= sample.labels.items()]


async def test_vllms_dashboards_find_their_metrics_labels_and_buckets():
    async with serving() as served:
        body = {"prompt": "abc", "max_tokens": 3}
        async with served.http.post(f"{served.base}/v1/completions", json=body) as answer:
            assert answer.status == 200
        families = await scraped(served)
    empty = []
    for file, panels in VLLM_PANELS.items():
        for title, asked in panels.items():
            found = {series: bool(selected(families, series)) for series in asked}
            for series, there in found.items():
                assert there != series.removeprefix("vllm:").startswith(ABSENT), (file, title, series)
            if not any(found.values()):
                empty.append(f"*{title}*")
    page = Path("docs/observability.md").read_text()
    assert [title for title in empty if title not in page] == [], "panels without data that the page does not name"
    for name, family in families.items():
        for sample in family.samples:
            if name.startswith("vllm:") and "websocket" not in name:
                assert (sample.labels["model_name"], sample.labels["engine"]) == ("fake", "0"), sample
    for name, buckets in (
        ("vllm:time_to_first_token_seconds", TTFT_BUCKETS),
        ("vllm:inter_token_latency_seconds", ITL_BUCKETS),
        ("vllm:request_time_per_output_token_seconds", ITL_BUCKETS),
        ("vllm:request_queue_time_seconds", E2E_BUCKETS),
    ):
        assert " ".join(s.labels["le"] for s in families[name].samples if s.name.endswith("_bucket")) == buckets
    assert [s.labels["le"] for s in families["vllm:request_prompt_tokens"].samples if "le" in s.labels][:5] == [
        *("1.0", "2.0", "5.0", "10.0", "20.0")
    ]


async def test_what_vllms_board_of_services_calls_down_is_up():
    async with serving() as served:
        families = await scraped(served)
    assert value(families, "vllm:engine_sleep_state", sleep_state="awake") == 1
    assert value(families, "vllm:engine_sleep_state", sleep_state="discard_all") == 0


async def test_prompt_tokens_add_up_however_they_are_asked_for():
    async with serving() as served, served.raw() as raw:
        for name in "ab":
            await raw.create(name, "abc" * 20, max_tokens=2)
            await raw.ended(name)
        families = await scraped(served)
    computed = value(families, "vllm:prompt_tokens_by_source_total", source="local_compute")
    cached = value(families, "vllm:prompt_tokens_by_source_total", source="local_cache_hit")
    assert computed + cached == value(families, "vllm:prompt_tokens_total") == 120
    assert cached == value(families, "vllm:prompt_tokens_cached_by_source_total", source="device")
    assert computed == value(families, "vllm:request_prefill_kv_computed_tokens_sum")


async def test_the_process_tells_of_itself():
    async with serving() as served:
        families = await scraped(served)
    itself = psutil.Process()
    assert value(families, "process_start_time_seconds") == pytest.approx(itself.create_time(), abs=2)
    assert value(families, "process_open_fds") == pytest.approx(itself.num_fds(), abs=8)
    assert value(families, "process_max_fds") == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


async def test_a_stream_is_counted_once_it_has_ended_and_a_socket_while_it_is_open():
    async with serving() as served:
        async with served.raw() as raw:
            served.engine.hold = 2
            await raw.create("a", "abc", max_tokens=5)
            await raw.create("b", "abcd", max_tokens=2)
            await raw.ended("b")
            await raw.wait_for(lambda message: message.get("state") == "stalled")
            before = await scraped(served)
            assert value(before, "vllm:websocket_connections_active") == 1
            assert value(before, "streamkv:streams_active", state="stalled") == 1
            assert value(before, "vllm:request_success_total", finished_reason="length") == 1
            await raw.send(t="cancel", id="a")
            await raw.ended("a")
        await eventually(lambda: served.server.recorder.metrics.sockets.values[()] == 0)
        served.server.metrics_door._sampled_at = float("-inf")  # a moment has passed
        after = await scraped(served)
    assert value(after, "vllm:request_success_total", finished_reason="abort") == 1
    assert value(after, "vllm:prompt_tokens_total") == 7
    assert value(after, "vllm:generation_tokens_total") == 4
    assert value(after, "vllm:time_to_first_token_seconds_count") == 2
    assert value(after, "vllm:inter_token_latency_seconds_count") == 2
    assert value(after, "vllm:websocket_connection_duration_seconds_count") == 1
    assert value(after, "streamkv:streams_active", state="stalled") == 0
    assert value(after, "http_requests_total", handler="/metrics", status="2xx") == 1
    assert value(after, "http_requests_total", handler="/v1/stream", status="1xx") == 1
    assert value(after, "http_request_duration_seconds_count", handler="/metrics") == 1
    (durations,) = (family for name, family in after.items() if name == "http_request_duration_seconds")
    assert "/v1/stream" not in {sample.labels["handler"] for sample in durations.samples}, "a socket's life is no answer's"


async def test_what_clients_make_up_makes_no_labels():
    async with serving() as served:
        for path in ("made-up", "made/up/2", "metrics/3", "%2e%2e/x"):
            async with served.http.request("PATCH", f"{served.base}/{path}") as answer:
                assert answer.status in (404, 405)
        assert value(await scraped(served), "http_requests_total", handler="none", method="none", status="4xx") == 4


@pytest.mark.parametrize("prefix", PREFIXES)
async def test_the_prefix_is_the_operators_choice(prefix: str):
    async with serving(metrics_prefix=prefix) as served:
        families = await scraped(served)
    begins = {name.partition(":")[0] for name in families if ":" in name}
    assert begins == {"vllm": {"vllm", "streamkv"}, "streamkv": {"streamkv"}, "both": {"vllm", "streamkv"}}[prefix]
    assert ("vllm:num_requests_running" in families) == (prefix != "streamkv")
    assert ("streamkv:num_requests_running" in families) == (prefix != "vllm")
    assert "streamkv:loop_lag_seconds" in families


@pytest.mark.parametrize(("public", "access"), [(False, Access.ADMIN), (True, Access.PUBLIC)])
async def test_admins_only_unless_told_otherwise(public: bool, access: Access):
    key = "an-admin-key-of-a-test-0123456789abcdef"
    async with serving(admin_key=key, metrics_public=public) as served:
        assert {route.access for route in served.server.metrics_door.routes()} == {access}
        async with served.http.get(f"{served.base}/metrics") as answer:
            assert answer.status == (200 if public else 401)
        await text_of(served, Authorization=f"Bearer {key}")


async def test_a_burst_of_scrapes_looks_at_the_engine_once():
    async with serving() as served:
        for _ in range(5):
            await text_of(served)
        assert served.engine.looks == 1


async def test_every_failure_is_an_answer_of_500():
    async with serving() as served:

        async def broken() -> Any:
            raise RuntimeError("a bug")

        served.engine.stats = broken  # type: ignore[method-assign]  # a planted fault
        async with served.http.get(f"{served.base}/metrics") as answer:
            assert answer.status == 500
        assert served.server.recorder.metrics.http.values["/metrics", "GET", "5xx"] == 1


async def test_who_is_turned_away_is_counted_by_gate():
    async with serving() as served:
        prepared = await served.streams.prepare("abc", SamplingParams(max_tokens=3), is_chat=False)
        with pytest.raises(RateLimitedError):
            served.server.admission.admit(Principal("acme", quota=Quota(streams=1)), prepared, ["a", "b"])
        families = await scraped(served)
    assert value(families, "streamkv:admission_rejects_total", gate="streams") == 1
    assert value(families, "streamkv:admission_rejects_total", gate="blocks") == 0
