"""What the panels of vLLM's own dashboards ask for: the files under `examples/observability/` of its repository.

Of each panel the series that its queries name, with the labels that they fix; `job`, `instance` and `model_name`, by which
nearly all select, are left out. A histogram `h` stands for `h_bucket`, `h_sum` and `h_count`. Read in vllm-project/vllm at
commits 4b5c627 (grafana.json), 5961e8d (performance_statistics.json), 030ea52 (query_statistics.json), 712d754
(vllm_service_status.json) and 0b9faa4 (tools/generate_grafana_dashboards.py, which makes the others).
"""

from __future__ import annotations

from typing import Final

_TTFT: Final = "vllm:time_to_first_token_seconds"
_ITL: Final = "vllm:inter_token_latency_seconds"
_TPOT: Final = "vllm:request_time_per_output_token_seconds"
_E2E: Final = "vllm:e2e_request_latency_seconds"
_QUEUE: Final = "vllm:request_queue_time_seconds"
_PREFILL: Final = "vllm:request_prefill_time_seconds"
_DECODE: Final = "vllm:request_decode_time_seconds"
_PROMPT: Final = "vllm:request_prompt_tokens"
_OUTPUT: Final = "vllm:request_generation_tokens"
_STEP: Final = "vllm:iteration_tokens_total"
_DONE: Final = "vllm:request_success_total"
_IN: Final = "vllm:prompt_tokens_total"
_OUT: Final = "vllm:generation_tokens_total"
_RUNNING: Final = "vllm:num_requests_running"
_WAITING: Final = "vllm:num_requests_waiting"
_KV: Final = "vllm:kv_cache_usage_perc"
_PREEMPTED: Final = "vllm:num_preemptions_total"
_HITS: Final = "vllm:prefix_cache_hits_total"
_QUERIES: Final = "vllm:prefix_cache_queries_total"
_CAPACITY: Final = 'vllm:num_requests_waiting_by_reason{reason="capacity"}'
_DEFERRED: Final = 'vllm:num_requests_waiting_by_reason{reason="deferred"}'
_SOURCE: Final = "vllm:prompt_tokens_by_source_total"
_HTTP: Final = "http_requests_total"
_DRAFTS: Final = "vllm:spec_decode_num_drafts_total"
_DRAFTED: Final = "vllm:spec_decode_num_draft_tokens_total"
_ACCEPTED: Final = "vllm:spec_decode_num_accepted_tokens_total"
_OFFLOAD: Final = "vllm:kv_offload_"
_NIXL: Final = "vllm:nixl_"
_AWAKE: Final = 'vllm:engine_sleep_state{sleep_state="awake"}'

_SHARED: Final = {
    "Scheduler queue": [_RUNNING, _CAPACITY, _DEFERRED],
    "KV cache usage": [_KV],
    "Tokens per engine step": [_STEP],
    "Cache hit rates": [
        *(_HITS, _QUERIES, "vllm:external_prefix_cache_hits_total", "vllm:external_prefix_cache_queries_total"),
        *("vllm:mm_cache_hits_total", "vllm:mm_cache_queries_total"),
    ],
    "Prompt tokens by source": [
        *(f'{_SOURCE}{{source="local_compute"}}', f'{_SOURCE}{{source="local_cache_hit"}}'),
        f'{_SOURCE}{{source="external_kv_transfer"}}',
    ],
}


def _shared(*titles: str) -> dict[str, list[str]]:
    return {title: _SHARED[title] for title in titles}


VLLM_PANELS: Final[dict[str, dict[str, list[str]]]] = {
    "grafana.json": {
        "E2E Request Latency": [_E2E],
        "Token Throughput": [_IN, _OUT],
        "Inter Token Latency": [_ITL],
        "Scheduler State": [_RUNNING, _WAITING],
        "Time To First Token Latency": [_TTFT],
        "Cache Utilization": [_KV],
        "Request Prompt Length": [_PROMPT],
        "Request Generation Length": [_OUTPUT],
        "Finish Reason": [f'{_DONE}{{finished_reason="length"}}'],
        "Queue Time": [_QUEUE],
        "Requests Prefill and Decode Time": [_PREFILL, _DECODE],
        "Max Generation Token in Sequence Group": ["vllm:request_max_num_generation_tokens"],
    },
    "performance_statistics.json": {
        "E2E Latency": [_E2E],
        "TTFT": [_TTFT],
        "ITL (Time Per Output Token)": [_ITL],
        "TPS (Tokens Per Second)": [_IN, _OUT],
    },
    "query_statistics.json": {
        "Successful Requests Over Time": [_DONE],
        "p50 to p99 Latency": [_E2E],
        "Input Token Size": [_PROMPT, _IN, _DONE],
        "Input Tokens Over Time": [_IN],
        "Output Tokens Over Time": [_OUT],
    },
    "vllm_service_status.json": {
        "Status": [_AWAKE],
        "Response time": [_TTFT, _RUNNING],
        "Output speed": [_OUT, _RUNNING],
        "Success rate": [f'{_DONE}{{finished_reason="error"}}', _DONE, _RUNNING],
        "Requests / min": [_DONE, _RUNNING],
    },
    "vllm_overview.json": {
        "Requests / s": [_DONE],
        "Input tok/s": [_IN],
        "Output tok/s": [_OUT],
        "5xx ratio": [_HTTP],
        "TTFT p95": [_TTFT],
        "ITL p95": [_ITL],
        "E2E p95": [_E2E],
        "Engines, Running": [_RUNNING],
        "Waiting": [_WAITING],
        "KV cache": [_KV],
        "Preemptions": [_PREEMPTED],
        "Prefix hits": [_HITS, _QUERIES],
        "TTFT SLO": [f'{_TTFT}_bucket{{le="{bound}"}}' for bound in ("0.1", "0.25", "0.5", "0.75", "1.0", "2.5", "5.0", "10.0")],
        # Its smallest choice, 0.025 and 0.05 s, and all others are bounds too.
        "TPOT SLO": [
            f'{_TPOT}_bucket{{le="{bound}"}}' for bound in ("0.025", "0.05", "0.075", "0.1", "0.15", "0.2", "0.3", "0.5")
        ],
        "Per-model summary": [_RUNNING, _DONE, _OUT, _TTFT, _ITL, _E2E, _KV, _PREEMPTED],
        "Time per output token (TPOT)": [_TPOT],
        "Queue time": [_QUEUE],
        "Mean time per request phase": [_QUEUE, _PREFILL, _DECODE],
        **_shared("Scheduler queue", "KV cache usage", "Tokens per engine step", "Cache hit rates", "Prompt tokens by source"),
        "Prompt length": [_PROMPT],
        "Output length": [_OUTPUT],
        "HTTP requests by status, by endpoint": [f'{_HTTP}{{handler="/v1/completions",status="2xx"}}'],
        "HTTP mean duration by endpoint": ['http_request_duration_seconds{handler="/v1/completions"}'],
    },
    "vllm_instances.json": {
        "Instances": [_RUNNING, _WAITING, _KV, _DONE, _OUT, _TTFT, _ITL, _PREEMPTED, "process_start_time_seconds"],
        "Running requests": [f'{_RUNNING}{{engine="0"}}'],
        "Engine steps / s": [f'{_STEP}_count{{engine="0"}}'],
        "Waiting requests by reason": [_CAPACITY, _DEFERRED],
        "CPU usage": ["process_cpu_seconds_total"],
        "Resident memory": ["process_resident_memory_bytes"],
        "Open file descriptors": ["process_open_fds", "process_max_fds"],
        "Cache configuration": ["vllm:cache_config_info"],
        "LoRA adapters": ["vllm:lora_requests_info"],
        "Engine sleep state": [_AWAKE, 'vllm:engine_sleep_state{sleep_state="discard_all"}'],
        "Sleep mode and weight update operations": [
            *("vllm:sleep_mode_operation_duration_seconds", "vllm:rl_weight_update_operation_duration_seconds"),
        ],
        "Estimated compute per GPU": ["vllm:estimated_flops_per_gpu_total"],
        "Estimated memory traffic per GPU": [
            *("vllm:estimated_read_bytes_per_gpu_total", "vllm:estimated_write_bytes_per_gpu_total"),
        ],
    },
    "vllm_kv_cache.json": {
        "Max and mean KV cache usage": [_KV],
        "Prefix cache hit rate": [_HITS, _QUERIES],
        "Cached prompt tokens": ["vllm:prompt_tokens_cached_total", _IN],
        "Preemptions / s": [_PREEMPTED],
        "Waiting for capacity": [_CAPACITY],
        **_shared("Scheduler queue", "Prompt tokens by source", "Cache hit rates"),
        "Cached prompt tokens by tier": ['vllm:prompt_tokens_cached_by_source_total{source="device"}'],
        "Prompt and computed tokens per request": [_PROMPT, "vllm:request_prefill_kv_computed_tokens"],
        "Block lifetime": ["vllm:kv_block_lifetime_seconds"],
        "Idle time before eviction": ["vllm:kv_block_idle_before_evict_seconds"],
        "Block reuse gap": ["vllm:kv_block_reuse_gap_seconds"],
        "External prefix cache hit rate": ["vllm:external_prefix_cache_hits_total", "vllm:external_prefix_cache_queries_total"],
        "Requests waiting on KV loads": ["vllm:num_requests_kv_fetch_by_stage"],
        "Prompt tokens loaded via KV transfer": [f'{_SOURCE}{{source="external_kv_transfer"}}'],
        "NIXL transfers": [f"{_NIXL}xfer_time_seconds", f"{_NIXL}bytes_transferred", f"{_NIXL}post_time_seconds"],
        "KV offloading": [f"{_OFFLOAD}load_bytes_total", f"{_OFFLOAD}store_bytes_total", f"{_OFFLOAD}load_size"],
        "Simple CPU offload": ["vllm:simple_kv_offload_save_outcomes_total", "vllm:simple_kv_offload_used_blocks"],
    },
    "vllm_speculative_decoding.json": {
        "Draft acceptance rate": [_ACCEPTED, _DRAFTED],
        "Acceptance length": [_ACCEPTED, _DRAFTS],
        "Output from drafts": [_ACCEPTED, _OUT],
        "Acceptance rate by draft position": ["vllm:spec_decode_num_accepted_tokens_per_pos_total", _DRAFTS],
        "Draft tokens / s": [_DRAFTED, _ACCEPTED],
        "Inter-token latency": [_ITL],
    },
}
"""File -> panel, or panels that differ in their functions only -> series."""
