"""Every metric of a server, under vLLM's names where vLLM has one, so that its Grafana dashboards load unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Literal, get_args

from streamkv.engine.api import KV_STATES, STEP_TOKEN_BOUNDS, EngineInfo, Miss
from streamkv.observe.exposition import Counter, Family, Gauge, Histogram, Summary, exposition
from streamkv.observe.lag import LoopLag

__all__ = ["FINISHED_REASONS", "GATES", "PREFIXES", "STATES", "Metrics", "Prefix"]

Prefix = Literal["vllm", "streamkv", "both"]
PREFIXES: Final[dict[Prefix, tuple[str, ...]]] = {
    "vllm": ("vllm:",),
    "streamkv": ("streamkv:",),
    "both": ("vllm:", "streamkv:"),
}
"""Of the metrics that vLLM has too. Those that only StreamKV has always begin with `streamkv:`."""

STATES: Final = ("queued", "prefill", "decode", "stalled", "preempted")
FINISHED_REASONS: Final = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}
"""The engine's word -> vLLM's."""
GATES: Final = ("streams", "requests", "prompt_tokens", "waiting", "backlog", "places", "blocks", "connections", "draining")
"""What turns work away: a tenant's quotas, what waits already, the KV blocks; too many sockets, a server that goes away."""

# vLLM 0.33.0.
_FIRST_TOKEN: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_INTER_TOKEN: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0),
    *(50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_CONNECTION: Final = (0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_FRAME: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_SEND: Final = (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def _one_two_five(largest: int) -> list[float]:
    """1 2 5 10 20 50 ... up to `largest`."""
    return [float(m * 10**e) for e in range(len(str(largest))) for m in (1, 2, 5) if m * 10**e <= largest]


class Metrics:
    """The table. Attributes are the metrics, under their names without prefix and unit."""

    def __init__(self, info: EngineInfo, lag: LoopLag) -> None:
        """`lag` is measured by whoever owns it."""
        self._model = (("model_name", info.model), ("engine", "0"))
        self._vllm = self._added(lambda: self._define_vllm(info))
        self._sockets = self._added(self._define_sockets)
        self._own = self._added(lambda: self._define_own(lag))
        self._process = self._added(self._define_process)

    def _added(self, define: Callable[[], None]) -> list[Family]:
        known = set(vars(self))
        define()
        return [value for name, value in vars(self).items() if name not in known]

    def _define_vllm(self, info: EngineInfo) -> None:
        tokens = _one_two_five(info.max_model_len)
        self.running = Gauge("num_requests_running", "Requests that hold KV blocks.")
        self.waiting = Gauge("num_requests_waiting", "Requests in the queue.")
        why = [("capacity",), ("deferred",)]
        self.waiting_why = Gauge(
            "num_requests_waiting_by_reason", "Of those, who waits for a place, and for credit.", ("reason",), why
        )
        self.kv_usage = Gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.")
        self.prefix_queries = Counter("prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.")
        self.prefix_hits = Counter("prefix_cache_hits_total", "Prompt tokens found in the prefix cache.")
        self.prompt_tokens = Counter("prompt_tokens_total", "Prompt tokens of admitted requests, cached ones included.")
        self.prompt_cached = Counter("prompt_tokens_cached_total", "Prompt tokens that were not computed.")
        sources = [("local_compute",), ("local_cache_hit",)]
        self.prompt_sources = Counter("prompt_tokens_by_source_total", "Prompt tokens, computed and not.", ("source",), sources)
        where = [("device",)]
        self.prompt_cached_where = Counter("prompt_tokens_cached_by_source_total", "Cached ones, by memory.", ("source",), where)
        self.generated = Counter("generation_tokens_total", "Output tokens.")
        self.preemptions = Counter("num_preemptions_total", "Times a request lost its blocks to others.")
        self.drafts = Counter("spec_decode_num_drafts_total", "Proposals of speculation that were checked.")
        self.draft_tokens = Counter("spec_decode_num_draft_tokens_total", "Tokens of those proposals.")
        self.accepted_tokens = Counter("spec_decode_num_accepted_tokens_total", "Tokens of proposals that were right.")
        reasons = [(reason,) for reason in FINISHED_REASONS.values()]
        self.success = Counter("request_success_total", "Finished requests by reason.", ("finished_reason",), reasons)
        self.ttft = Histogram("time_to_first_token_seconds", "From submission to the first token.", _FIRST_TOKEN)
        self.itl = Histogram("inter_token_latency_seconds", "From a token to the request's next one.", _INTER_TOKEN)
        self.tpot = Histogram("request_time_per_output_token_seconds", "Decode time by token, mean of a request.", _INTER_TOKEN)
        self.e2e = Histogram("e2e_request_latency_seconds", "From submission to the last token.", _REQUEST)
        self.queue = Histogram("request_queue_time_seconds", "From submission to admission.", _REQUEST)
        self.prefill = Histogram("request_prefill_time_seconds", "From admission to the first token.", _REQUEST)
        self.decode = Histogram("request_decode_time_seconds", "From the first token to the last.", _REQUEST)
        self.inference = Histogram("request_inference_time_seconds", "From admission to the last token.", _REQUEST)
        self.request_prompt = Histogram("request_prompt_tokens", "Prompt tokens of a request.", tokens)
        self.request_computed = Histogram("request_prefill_kv_computed_tokens", "Those that were computed.", tokens)
        self.request_generated = Histogram("request_generation_tokens", "Output tokens of a request.", tokens)
        self.request_wanted = Histogram("request_max_num_generation_tokens", "Output tokens a request may have.", tokens)
        self.request_n = Histogram("request_params_n", "Samples of a prompt.", (1.0, 2.0, 5.0, 10.0, 20.0))
        bounds = [float(bound) for bound in STEP_TOKEN_BOUNDS]
        self.step_tokens = Histogram("iteration_tokens_total", "Tokens computed by a step.", bounds)
        facts = {"block_size": str(info.block_size), "num_gpu_blocks": str(info.num_blocks), "cache_dtype": info.dtype}
        self.cache_config = Gauge("cache_config_info", "The KV pool.", tuple(facts), [tuple(facts.values())])
        self.cache_config.set(1, *facts.values())
        self.sleep = Gauge("engine_sleep_state", "Always awake.", ("sleep_state",), [("weights_offloaded",), ("discard_all",)])
        self.sleep.set(1, "awake")

    def _define_sockets(self) -> None:
        """Also vLLM's, and there without labels."""
        self.sockets = Gauge("websocket_connections_active", "Open WebSockets.")
        self.sockets_opened = Counter("websocket_connections_total", "WebSockets since the start.")
        self.socket_seconds = Histogram("websocket_connection_duration_seconds", "Life of a WebSocket.", _CONNECTION)

    def _define_own(self, lag: LoopLag) -> None:
        self.streams = Gauge("streams_active", "Streams by state.", ("state",), [(state,) for state in STATES])
        self.stalled = Counter("stream_stalled_seconds_total", "Time of finished streams without credit.")
        self.preempted = Counter(
            "stream_preempted_seconds_total", "Time of finished streams from a preemption to the next token."
        )
        self.chunks = Histogram("prefill_chunks", "Steps that computed a prompt.", (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0))
        reasons = [(reason,) for reason in get_args(Miss)]
        self.misses = Counter("prefix_cache_misses_total", "Prompts not wholly cached, by reason.", ("reason",), reasons)
        self.slow = Counter("slow_consumer_aborts_total", "Connections ended because their peer did not read.")
        results = [("resumed",), ("gone",)]
        self.resumes = Counter("resumes_total", "Streams taken up again after a lost connection.", ("result",), results)
        self.replayed = Counter("replayed_tokens_total", "Tokens sent once more after a resume.")
        self.orphans = Counter("orphan_tokens_total", "Tokens generated while no client was connected to their stream.")
        self.frame_tokens = Histogram("coalesced_tokens_per_frame", "Tokens of a delta frame.", _FRAME)
        self.send_seconds = Histogram("send_seconds", "Time that the socket took to accept a frame.", _SEND)
        self.outbound = Gauge("outbound_queue_bytes", "Text that waits for readers.")
        gates = [(gate,) for gate in GATES]
        self.rejects = Counter("admission_rejects_total", "Requests turned away, by gate.", ("gate",), gates)
        self.evictions = Counter("kv_evictions_total", "Cached KV blocks lost to others.")
        ways = [("out",), ("in",)]
        self.swapped = Counter("kv_swapped_blocks_total", "KV blocks moved to host memory and back.", ("direction",), ways)
        self.host_blocks = Gauge("kv_host_blocks", "KV blocks of preempted requests in host memory.")
        self.blocks = Gauge("kv_blocks", "KV blocks by state.", ("state",), [(state,) for state in KV_STATES])
        self.shared = Gauge("kv_shared_blocks", "KV blocks that several requests share.")
        self.waste = Gauge("kv_waste_ratio", "Share of the slots of used blocks that hold no token.")
        self.lag = lag.histogram

    def _define_process(self) -> None:
        """Under everybody's names, without labels."""
        self.http = Counter("http_requests_total", "HTTP requests answered.", ("handler", "method", "status"))
        self.http_seconds = Summary("http_request_duration_seconds", "Until the end of the answer.", ("handler", "method"))
        self.resident = Gauge("process_resident_memory_bytes", "Memory of the process.")
        self.cpu = Counter("process_cpu_seconds_total", "Processor time of the process.")
        self.started = Gauge("process_start_time_seconds", "When the process began, seconds since 1970.")
        self.files = Gauge("process_open_fds", "Open files and sockets.")
        self.max_files = Gauge("process_max_fds", "How many there may be.")

    def families(self, prefix: Prefix) -> Iterator[tuple[str, Family, tuple[tuple[str, str], ...]]]:
        """(full name, metric, labels that every sample has)."""
        for start in PREFIXES[prefix]:
            for family in self._vllm:
                yield start + family.name, family, self._model
            for family in self._sockets:
                yield start + family.name, family, ()
        for family in self._own:
            yield "streamkv:" + family.name, family, self._model
        for family in self._process:
            yield family.name, family, ()

    def text(self, prefix: Prefix) -> str:
        """What a scrape gets."""
        return exposition(self.families(prefix))
