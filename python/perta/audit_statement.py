"""An audit as an in-toto statement with a test result, to be signed. Spec: docs/provenance.md, "An
audit"."""

import hashlib
import json
import os
from typing import Any

RESULTS = {"pass": "passedTests", "warn": "warnedTests", "fail": "failedTests"}


def statement(found: dict[str, Any], written: bytes) -> str:
    """found: audit.json, which was written so. The text is canonical: keys are sorted, and there are
    neither spaces nor times."""
    audit = {"name": "audit.json", "digest": {"sha256": hashlib.sha256(written).hexdigest()}}
    name = f"{os.path.basename(os.path.abspath(found['patch']['path']))}/manifest.json"
    patch = {"name": name, "digest": {"sha256": found["patch"]["manifest_sha256"]}}
    checks = found["checks"]
    result = next((word for key, word in (("fail", "FAILED"), ("warn", "WARNED"))
                   if any(one["result"] == key for one in checks)), "PASSED")  # fmt: skip
    tests = {key: [one["name"] for one in checks if one["result"] == word] for word, key in RESULTS.items()}
    whole = {
        "_type": "https://in-toto.io/Statement/v1", "subject": [audit, patch],
        "predicateType": "https://in-toto.io/attestation/test-result/v0.1",
        "predicate": {"result": result, "configuration": [audit], **tests},
    }  # fmt: skip
    return json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
