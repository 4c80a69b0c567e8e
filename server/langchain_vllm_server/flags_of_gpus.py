"""Flags of `vllm serve` that have nothing to do here: accepted with a warning, or refused where that would lie."""

from __future__ import annotations

# They steer GPUs, processes or kernels, or switch on what is always on: the answers are the same without them.
VALUES = """
--tensor-parallel-size/-tp --pipeline-parallel-size/-pp --data-parallel-size/-dp --data-parallel-size-local/-dpl
--data-parallel-start-rank/-dpr --data-parallel-rank/-dpn --data-parallel-address/-dpa --data-parallel-rpc-port/-dpp
--data-parallel-backend/-dpb --prefill-context-parallel-size/-pcp --decode-context-parallel-size/-dcp
--distributed-executor-backend --max-parallel-loading-workers --nnodes/-n --node-rank/-r --master-addr --master-port
--api-server-count/-asc --worker-cls --worker-extension-cls
--kv-cache-memory-bytes --swap-space --cpu-offload-gb
--block-size --num-gpu-blocks-override --kv-offloading-size --kv-offloading-backend --prefix-caching-hash-algo
--attention-backend --compilation-config/-O/-cc --cudagraph-capture-sizes --max-cudagraph-capture-size
--max-seq-len-to-capture --optimization-level --kernel-config --attention-config --performance-mode
--speculative-config --spec-method --spec-model --spec-tokens --additional-config --model-loader-extra-config
--profiler-config --observability-config --otlp-traces-endpoint --collect-detailed-traces
--show-hidden-metrics-for-version
--max-num-partial-prefills --max-long-partial-prefills --long-prefill-token-threshold --num-lookahead-slots
--hf-token --hf-config-path --code-revision --tokenizer-revision --config-format
--max-loras --max-lora-rank --lora-dtype --limit-mm-per-prompt --mm-processor-cache-gb --allowed-local-media-path
--h11-max-incomplete-event-size --h11-max-header-count
--tool-strict-level
"""
SWITCHES = """
--trust-remote-code --enable-chunked-prefill --async-scheduling --disable-custom-all-reduce
--disable-sliding-window --enable-expert-parallel/-ep --enable-eplb --enable-dbo --use-tqdm-on-load
--data-parallel-hybrid-lb/-dph --data-parallel-external-lb/-dpe --disable-log-stats --disable-log-requests
--enable-log-deltas --log-error-stack --enable-mfu-metrics --kv-cache-metrics --disable-frontend-multiprocessing
--enable-prompt-tokens-details --enable-per-request-metrics --enable-server-load-tracking
--enable-auto-tool-choice --enable-offline-docs
--enable-sleep-mode --enable-scale-out --enable-ssl-refresh --calculate-kv-scales --disable-cascade-attn
--disable-hybrid-kv-cache-manager
"""

# Ignoring these would change what is served or how it is reached. Name → why; each takes a value or none.
REFUSED = {
    "--enable-lora": "LoRA adapters are not served: merge the adapter into the model",
    "--lora-modules": "LoRA adapters are not served: merge the adapter into the model",
    "--hf-overrides": "a checkpoint's configuration is served as it is: change its config.json",
    "--rope-scaling": "a checkpoint's configuration is served as it is: change its config.json",
    "--rope-theta": "a checkpoint's configuration is served as it is: change its config.json",
    "--tool-parser-plugin": "parsers cannot be loaded from a file",
    "--reasoning-parser-plugin": "parsers cannot be loaded from a file",
    "--tool-server": "the server runs no tools of its own",
    "--logits-processors": "logits processors cannot be loaded",
    "--headless": "there is no server without HTTP",
    "--tokens-only": "the server always speaks text, too",
    "--skip-tokenizer-init": "the server always speaks text, too",
    "--enable-prompt-embeds": "prompts are text or token ids",
    "--grpc": "the server speaks HTTP",
    "--grpc-port": "the server speaks HTTP",
    "--log-config-file": "use --log-level and --log-format",
    "--kv-transfer-config": "caches are not shared between servers",
    "--ec-transfer-config": "caches are not shared between servers",
}

# Values that say what is done anyway; any other is refused.
ONLY = {
    "--load-format": ("auto", "safetensors", "gguf"),
    "--tokenizer-mode": ("auto", "hf"),
    "--runner": ("auto", "generate"),
    "--convert": ("auto", "none"),
    "--task": ("auto", "generate"),
    "--model-impl": ("auto", "vllm"),
}
