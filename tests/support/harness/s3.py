"""An S3 server (moto) in a process of its own, for logs and results."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests

from harness.server_process import ServerProcess


class S3Server(ServerProcess):
    """A server that takes any credentials, and forgets all when it ends."""

    name = "S3"

    def command(self) -> Sequence[str | Path]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]

    def answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/moto-api/", timeout=5).ok
        except requests.RequestException:
            return False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def connection(self) -> dict[str, Any]:
        """It, as an Airflow connection."""
        extra = {"endpoint_url": self.url, "region_name": "us-east-1"}
        return {"conn_type": "aws", "login": "key", "password": "secret", "extra": extra}

    def client(self) -> Any:
        import boto3

        extra = self.connection["extra"]
        return boto3.client("s3", aws_access_key_id="key", aws_secret_access_key="secret", **extra)

    def create_bucket(self, name: str) -> None:
        self.client().create_bucket(Bucket=name)

    def read(self, bucket: str, prefix: str) -> dict[str, bytes]:
        """All objects below a prefix, by their keys."""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return {key: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}
