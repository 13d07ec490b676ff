"""`python -m dsv3_jax serve`: a checkpoint behind OpenAI's API.

    python -m dsv3_jax serve --checkpoint runs/chat --speculative 1
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hello"}]}'
"""

import logging
import sys
from typing import Any

import jax

from dsv3_jax.config import UserError
from dsv3_jax.data.supervised import find_template
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.options import EngineOptions
from dsv3_jax.kernels.mla_decode.kv_splits import PAGE
from dsv3_jax.loading import find_tokenizer, load
from dsv3_jax.parallel.compiler_options import rounding_line
from dsv3_jax.serving.options import ServeOptions

log = logging.getLogger(__name__)
DEFAULT_LENGTH = 8192


def serve(options: ServeOptions) -> None:
    """Serves until SIGTERM or SIGINT, and then until the answers under way are written."""
    uvicorn = _server_library()
    options.check()
    if jax.process_count() > 1:
        raise UserError("serve runs in one process; on several hosts start one each")
    from dsv3_jax.serving.answer import Limits
    from dsv3_jax.serving.app import make_app
    from dsv3_jax.serving.draining import DrainingServer

    worker, served = _load(options)
    limits = Limits(options.max_body_bytes, options.request_timeout, options.api_key)
    config = uvicorn.Config(
        make_app(worker, served, limits),
        host=options.host,
        port=options.port,
        log_level="warning",
        limit_concurrency=options.max_connections,
        timeout_graceful_shutdown=1,  # after what the server waits by itself
        timeout_keep_alive=30,
    )
    server = DrainingServer(config, worker, options.drain_timeout)
    sock = config.bind_socket()
    sock.listen(config.backlog)  # who reads the line below may connect at once
    host, port = sock.getsockname()[:2]
    print(f"serving {served.model} at http://{host}:{port}/v1", flush=True)
    server.run(sockets=[sock])


def _load(options: ServeOptions) -> Any:
    """(a worker whose engine has compiled all that it needs, what is served)."""
    from dsv3_jax.serving.protocol import Served
    from dsv3_jax.serving.worker import Worker

    tokenizer = find_tokenizer(options.checkpoint, options.tokenizer)
    template = find_template(options.chat_template, options.checkpoint, tokenizer)
    model = load(
        options.checkpoint,
        mesh=options.mesh,
        sharding=options.sharding,
        expert_parallel=options.expert_parallel,
        step=options.step,
        fp8=options.fp8,
    )
    config, groups = model.config.model, model.layout.size("batch")
    length = options.max_length or min(DEFAULT_LENGTH, config.max_position_embeddings)
    largest = max(options.prefill_tokens, 1)
    engine = Engine(
        model.variables,
        config,
        EngineOptions(
            slots=options.slots,
            max_length=length,
            pages=options.pages,
            chunks=tuple(sorted({min(n, largest) for n in (32, 128, largest)})),
            chunk_rows=(groups,),
            token_budget=largest * groups + options.slots * (1 + options.speculative),
            drafts=options.speculative,
            fp8_cache=options.fp8_cache,
            micro_batches=options.micro_batches,
            top=options.top_logprobs,
            page=PAGE,
        ),
        model.layout,
    )
    if line := rounding_line(jax.default_backend(), config.dtype):
        print(f"products {line}", file=sys.stderr)
    print("compiling", file=sys.stderr, flush=True)
    engine.warm_up()
    name = options.model_name or options.checkpoint.resolve().name
    return Worker(engine, options.max_waiting), Served(
        name, tokenizer, template, length, options.top_logprobs
    )


def _server_library() -> Any:
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(
            "serve needs starlette and uvicorn: pip install 'dsv3_jax[serve]'"
        ) from error
    return uvicorn
