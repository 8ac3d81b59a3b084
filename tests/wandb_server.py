"""A server that speaks as much of W&B's protocol as a run needs, and keeps what it is told of each run.

It stands in for the service, which no test can reach: W&B's own program talks to it over HTTP, sends its files and
asks it where a resumed run stands.
"""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """Listens on a free port of this machine.

    Attributes:
        streams: by run and file, the lines that were streamed, at the places that the sender named.
        keys: that were sent.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.streams: dict[str, dict[str, list[str]]] = {}
        self.keys: set[str] = set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def history(self, run: str) -> list[dict[str, Any]]:
        """The rows of a run's curve, without what W&B adds to each."""
        rows = map(json.loads, self.streams[run]["wandb-history.jsonl"])
        return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]

    def answer(self, query: str, said: dict[str, Any]) -> dict[str, Any]:
        """What the service says to a GraphQL query."""
        if "upsertBucket" in query:
            project = {"id": "p", "name": said.get("project"), "entity": {"id": "e", "name": "lab"}}
            known = said["name"] in self.streams
            bucket = {"id": f"id-{said['name']}", "name": said["name"], "displayName": said["name"], "config": "{}"}
            bucket |= {"description": "", "sweepName": None, "project": project, "historyLineCount": 0}
            self.streams.setdefault(said["name"], {})
            return {"upsertBucket": {"bucket": bucket, "inserted": not known}}
        if "RunResumeStatus" in query or "historyTail" in query:
            streams = self.streams.get(said["name"])
            if not streams or "wandb-history.jsonl" not in streams:
                return {"model": {"id": "p", "name": said["project"], "entity": {"id": "e", "name": "lab"}}}
            lines = {part: streams.get(f"wandb-{part}.jsonl", []) for part in ("history", "events")}
            bucket = {f"{part}Tail": json.dumps(found[-1:]) for part, found in lines.items()}
            bucket |= {f"{part}LineCount": len(found) for part, found in lines.items()}
            bucket |= {"id": f"id-{said['name']}", "name": said["name"], "config": "{}", "logLineCount": 0}
            bucket |= {"summaryMetrics": lines["history"][-1], "wandbConfig": '{"t": 1}', "tags": []}
            return {
                "model": {"id": "p", "name": said["project"], "entity": {"id": "e", "name": "lab"}, "bucket": bucket}
            }
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in said["files"]]
            return {"createRunFiles": {"runID": f"id-{said['run']}", "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            return {"viewer": {"id": "1", "entity": "lab", "username": "lab", "flags": "{}", "teams": {"edges": []}}}
        return {}


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.keys.add(self.headers.get("Authorization", ""))
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            answer = {"data": self.server.answer(asked["query"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            run = self.path.split("/")[-2]
            for name, chunk in (json.loads(body).get("files") or {}).items():
                lines = self.server.streams[run].setdefault(name, [])
                lines[chunk["offset"] : chunk["offset"] + len(chunk["content"])] = chunk["content"]
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_PUT = do_GET = do_POST  # noqa: N815
