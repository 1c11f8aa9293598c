"""The application: routes of OpenAI's and LiteLLM's clients, operations, and a page to try it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from beavertails_v.taxonomy import Taxonomy
from guard.server import shapes
from guard.server.chat import Loop
from guard.server.content import Reader, RequestError, Turn
from guard.server.fetch import Fetcher
from guard.server.gate import Gate
from guard.server.metrics import Metrics
from guard.server.moderator import Busy, Moderator
from guard.server.pool import Pool
from guard.server.settings import ServeSettings
from guard.server.streaming import Stream
from guard.server.upstream import HttpUpstream, LocalUpstream, Upstream, UpstreamError
from guard.server.work import Item, MakeGuard, MakePolicy
from guard.types import Verdict

log = logging.getLogger(__name__)
BUSY_SECONDS = "1"
FAILED_OPEN = "x-guard-failed-open"
PAGE_MAY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)


class Server:
    """Everything behind the routes. transport: of httpx, for tests of the proxy and of remote pictures."""

    def __init__(self, make: Callable[[], Any], settings: ServeSettings, transport: Any = None) -> None:
        self.settings, self.metrics, self.taxonomy = settings, Metrics(), Taxonomy.load()
        self.pool = Pool(
            make,
            workers=settings.workers,
            max_batch_size=settings.max_batch_size,
            batch_wait_s=settings.batch_wait_ms / 1000,
            max_queue=settings.max_queue,
            timeout_s=settings.timeout_s,
            observe=self.metrics.batch,
        )
        self.moderator = Moderator(self.pool, settings, self.metrics)
        self.fetch = Fetcher(settings, transport)
        self.upstream = self._upstream(transport)
        self.log = open(settings.log_content, "a", encoding="utf-8", errors="replace") if settings.log_content else None  # noqa: SIM115
        self.loop = None if self.upstream is None else Loop(self.moderator, self.upstream, self.log)
        self.fault: str | None = "it is starting"
        self.gate: Gate | None = None
        for name, read in {
            "queue_length": lambda: self.pool.waiting,
            "workers_ready": lambda: self.pool.alive,
            "worker_restarts": lambda: self.pool.restarts,
            "ready": lambda: float(self.not_ready() is None),
        }.items():
            self.metrics.watch(name, read)

    def _upstream(self, transport: Any) -> Upstream | None:
        upstream = self.settings.upstream
        if upstream.url:
            return HttpUpstream(self.settings, transport)
        if not upstream.policy:
            return None
        pool = Pool(MakePolicy(upstream.policy), max_batch_size=8, timeout_s=upstream.timeout_s)
        return LocalUpstream(pool, self.settings)

    def start(self) -> None:
        """Loads and tests everything; on a fault the server stays up and says so at /readyz."""
        try:
            self.pool.start()
            if isinstance(self.upstream, LocalUpstream):
                self.upstream.pool.start()
        except Exception as error:
            self.fault = str(error)
            log.error("not ready: %s", error)
            return
        self.fault = None
        log.info("ready: %s", self.pool.info)

    def not_ready(self) -> str | None:
        """Why it cannot judge now; None where it can."""
        if self.fault is not None:
            return self.fault
        if self.gate is not None and self.gate.stopping:
            return "it is stopping"
        return None if self.pool.alive else "every worker is being started anew"

    async def stop(self) -> None:
        await asyncio.to_thread(self.pool.close)
        if self.upstream is not None:
            await self.upstream.close()
        await self.fetch.close()
        if self.log is not None:
            self.log.close()

    def reader(self) -> Reader:
        return Reader(self.settings, self.fetch)

    def result_settings(self, reasons: bool | None) -> dict[str, Any]:
        return {
            "taxonomy": self.taxonomy,
            "thresholds": self.moderator.info.get("category_threshold", {}),
            "reasons": self.settings.reasons if reasons is None else reasons,
        }


def application(
    folder: str | Path,
    settings: ServeSettings | None = None,
    *,
    policy: str | Path | None = None,
    keys: list[str] | None = None,
    make: Callable[[], Any] | None = None,
    transport: Any = None,
) -> FastAPI:
    """The ASGI application of a trained guard's folder.

    policy: a severity policy file in place of the guard's own. keys: None reads SAFE_RLHF_V_API_KEYS. make: in place of
    loading the folder. transport: of httpx.
    """
    settings = settings or ServeSettings()
    default = MakeGuard(
        str(folder),
        None if policy is None else str(policy),
        settings.device,
        settings.max_batch_size,
        settings.picture_cache_mb * 2**20,
    )
    server = Server(make or default, settings, transport)

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.get_running_loop().run_in_executor(None, server.start)
        yield
        await starting
        await server.stop()

    app = FastAPI(
        title="Beaver-Guard-V",
        version=importlib.metadata.version("safe-rlhf-v"),
        description="Moderation of pictures and text: four severity levels, twenty categories, one forward pass.",
        lifespan=life,
    )
    app.state.server = server
    app.add_middleware(_gate_of(server, keys))
    _handle_faults(app)
    _add_moderation(app, server)
    _add_chat(app, server)
    _add_operations(app, server)
    return app


def _gate_of(server: Server, keys: list[str] | None) -> Any:
    def made(app: Any) -> Gate:
        server.gate = Gate(app, server.settings, server.metrics, keys)
        return server.gate

    return made


def _handle_faults(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def request_error(request: Request, fault: RequestError) -> JSONResponse:
        return JSONResponse(shapes.error(str(fault), param=fault.param, code=fault.code), fault.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, fault: RequestValidationError) -> JSONResponse:
        first = fault.errors()[0]
        param = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse(shapes.error(f"{param or 'body'}: {first['msg']}", param=param, code="invalid_value"), 400)

    @app.exception_handler(Busy)
    async def busy(request: Request, fault: Busy) -> JSONResponse:
        body = shapes.error(f"too much is waiting: {fault}", kind="server_error", code="busy")
        return JSONResponse(body, 503, {"retry-after": BUSY_SECONDS})

    @app.exception_handler(UpstreamError)
    async def upstream(request: Request, fault: UpstreamError) -> JSONResponse:
        headers = {"retry-after": BUSY_SECONDS} if fault.status == 503 else {}
        return JSONResponse(shapes.error(str(fault), kind="upstream_error"), fault.status, headers)

    @app.exception_handler(HTTPException)
    async def http(request: Request, fault: HTTPException) -> JSONResponse:
        return JSONResponse(shapes.error(str(fault.detail)), fault.status_code, fault.headers)

    @app.exception_handler(Exception)
    async def fault(request: Request, fault: Exception) -> JSONResponse:
        log.exception("a request failed", exc_info=fault)
        return JSONResponse(shapes.error("the server is at fault; nothing was judged", kind="server_error"), 500)


def _require_ready(server: Server) -> None:
    if (why := server.not_ready()) is not None:
        raise Busy(f"not ready: {why}")


def _read_of(turn: Turn, response: str | None = None) -> list[str]:
    return [*(["text"] if turn.text.strip() or response else []), *(["image"] if turn.pictures else [])]


def _opened(verdicts: Sequence[Verdict | None]) -> dict[str, str]:
    opened = sum(v is not None and v.failed_open for v in verdicts)
    return {FAILED_OPEN: str(opened)} if opened else {}


def _add_moderation(app: FastAPI, server: Server) -> None:
    @app.post("/v1/moderations", summary="Judge texts and pictures, in OpenAI's shape")
    async def moderations(request: shapes.ModerationRequest) -> JSONResponse:
        _require_ready(server)
        inputs = await server.reader().inputs(request.input)
        if request.response is not None and len(inputs) != 1:
            raise RequestError("response goes with one input", "response")
        items = [Item(turn.text, turn.pictures, request.response) for turn, _ in inputs]
        verdicts = await server.moderator.judge_all(items, [where for _, where in inputs])
        read = [_read_of(turn, request.response) for turn, _ in inputs]
        model = request.model or server.settings.model_name
        found = list(zip(verdicts, read, strict=True))
        body = shapes.moderation(found, model=model, **server.result_settings(request.reasons))
        return JSONResponse(body, headers=_opened(verdicts))

    @app.post("/beta/litellm_basic_guardrail_api", summary="LiteLLM's generic guardrail")
    async def guardrail(request: shapes.GuardrailRequest) -> JSONResponse:
        _require_ready(server)
        verdict = await _guardrail(server, request)
        if verdict is None or verdict.action == "allow":
            return JSONResponse({"action": "NONE"}, headers=_opened([verdict]))
        kind = (verdict.top_category or "content that could not be judged").replace("_", " ")
        reason = f"{kind}, severity {verdict.severity.name.lower()}"
        return JSONResponse({"action": "BLOCKED", "blocked_reason": reason})


async def _guardrail(server: Server, request: shapes.GuardrailRequest) -> Verdict | None:
    """The strictest verdict on all that the gateway hands over; None where it hands over nothing."""
    reader = server.reader()
    turns = (
        await reader.messages(request.structured_messages, "structured_messages") if request.structured_messages else []
    )
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in request.images or []]
    pictures = (await reader.turn("user", parts, "images")).pictures
    texts = [(await reader.turn("user", text, "texts")).text for text in request.texts or []]
    called = reader.spoken({"tool_calls": request.tool_calls}, "tool_calls")
    if request.input_type == "response":
        asked = [t for t in turns if t.role != "assistant"] or [Turn("user", "", pictures)]
        said = "\n".join([*texts, *called])
        if not said.strip():
            return None
        if not any(turn.text.strip() or turn.pictures for turn in asked):
            return await server.moderator.judge(Item(said), "texts")  # an answer without its question, read as a text
        return await server.moderator.judge_response(asked, said, "texts")
    turns = [*turns, Turn("user", "\n".join([*texts, *called]), pictures)] if texts or called or pictures else turns
    if not any(turn.text.strip() or turn.pictures for turn in turns):
        return None
    return await server.moderator.judge_query(turns)


def _add_chat(app: FastAPI, server: Server) -> None:
    @app.post("/v1/chat/completions", summary="Answer through the guard", response_model=None)
    async def chat(request: shapes.ChatRequest) -> Response:
        if server.loop is None:
            raise RequestError(
                "no model answers here: start the server with --upstream URL or --policy FOLDER", status=501,
                code="no_upstream",
            )  # fmt: skip
        _require_ready(server)
        talk = await server.loop.begin(request, server.reader())
        if request.stream:
            return StreamingResponse(Stream(server.loop, talk).events(), media_type="text/event-stream")
        body = await server.loop.answer(talk)
        return JSONResponse(body, headers={FAILED_OPEN: "1"} if _any_open(body) else {})

    @app.get("/v1/models", summary="The model that answers, and the guard")
    async def models() -> dict[str, Any]:
        names = [
            server.settings.model_name,
            *([server.settings.upstream.model] if server.settings.upstream.model else []),
        ]
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "owned_by": "safe-rlhf-v"} for name in names],
        }


def _any_open(body: dict[str, Any]) -> bool:
    report = body["guard"]
    return any(v["failed_open"] for v in [*report["verdicts"], *([report["query"]] if report["query"] else [])])


def _add_operations(app: FastAPI, server: Server) -> None:
    @app.get("/healthz", summary="Whether the server runs")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="Whether it can judge: loaded, and its self-test passed")
    async def readyz() -> JSONResponse:
        why = server.not_ready()
        return JSONResponse({"ready": why is None} | ({"why": why} if why else {}), 200 if why is None else 503)

    @app.get("/metrics", summary="Figures for Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/version", summary="What judges here")
    async def version() -> dict[str, Any]:
        keys = ("taxonomy", "weights", "calibration_id", "policy", "kinds", "golden")
        return {"safe_rlhf_v": app.version} | {k: server.moderator.info.get(k) for k in keys}

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        text = files("guard.server").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"content-security-policy": PAGE_MAY, "x-content-type-options": "nosniff"})
