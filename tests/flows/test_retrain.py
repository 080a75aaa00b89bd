"""The flow `retrain`: what it finds to do, what it does, and what it says, in a repository of trivial steps (conftest.py)."""

import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import httpx
import psutil
import pytest

from fast_goal.stages import STEPS

OPERATIONS = ["drift", "gate"]


@pytest.fixture(scope="module")
def flow(flows):
    return flows("retrain")


@pytest.fixture
def run(flow, capsys):
    """Runs the flow as `python flows/retrain.py`; its exit status and last message."""

    def run(*arguments):
        status = flow.main(list(arguments))
        said = capsys.readouterr()
        return status, (said.err if status else said.out).strip().removeprefix("retrain: ")

    return run


@pytest.fixture
def registered(root, flows, run):
    """All steps are up to date and the last version is not judged: what a kill between `register` and the gate leaves."""
    if flows("looking").out_of_date():
        assert run()[0] == 0
    shutil.rmtree(root / "models/decisions", ignore_errors=True)


@pytest.fixture
def verdict(root):
    """Says what the gate will decide."""
    (root / "verdict").write_text("promoted")
    yield (root / "verdict").write_text
    (root / "verdict").write_text("promoted")


@pytest.fixture
def webhook(monkeypatch):
    """A web server that keeps what is posted to it, and takes `seconds` for its answer of `status`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            server.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            time.sleep(server.seconds)
            self.send_response(server.status)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.received, server.seconds, server.status = [], 0, 200
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.url = f"http://127.0.0.1:{server.server_port}/services/a-secret"
        monkeypatch.setenv("FAST_GOAL_WEBHOOK_URL", server.url)
        yield server
        server.shutdown()


def test_new_data_are_learnt_judged_and_told_and_then_there_is_nothing_to_do(
    root, run, api, ran, new_data, decisions, verdict, webhook
):
    new_data()
    status, said = run()
    version = len((root / "versions").read_text())
    assert (status, said) == (0, f"promoted version {version} in place of version 100")
    assert ran() == [*STEPS, *OPERATIONS]
    [line] = decisions()
    assert line["new_data"] and "start.txt" in line["out_of_date"]["download"] and line["seconds"] > 0
    assert (line["decision"], line["candidate"], line["champion"]) == ("promoted", str(version), 100)

    wanted = {"artifacts": {"key": {"any_": ["retrain"]}}, "sort": "CREATED_DESC"}
    [artifact, *_] = httpx.post(f"{api}/artifacts/filter", json=wanted).raise_for_status().json()
    assert artifact["data"].startswith(f"# Promoted version {version}") and "| long | yes | R@1 +2.0 |" in artifact["data"]
    assert "None of 1 tests found any." in artifact["data"]
    [told] = webhook.received
    assert told["event"] == "promoted" and told["text"] == f"Promoted version {version} in place of version 100"
    assert told["flow_run"] == line["flow_run"] and told["details"]["candidate"]["version"] == version

    begin = time.monotonic()
    assert run() == (0, "nothing to do")
    assert time.monotonic() - begin < 30, "of which DVC takes one; 30 for a machine at work"
    assert ran()[len(STEPS) + 2 :] == [] and len(webhook.received) == 1
    assert [line["decision"] for line in decisions()] == ["promoted", "nothing to do"]
    wanted = {"flow_runs": {"id": {"any_": [decisions()[-1]["flow_run"]]}}}
    [recorded] = httpx.post(f"{api}/flow_runs/filter", json=wanted).raise_for_status().json()
    assert recorded["state"]["type"] == "COMPLETED" and recorded["state"]["message"] == "nothing to do"


def test_a_candidate_that_was_not_judged_is_judged_and_nothing_else(run, registered, ran, verdict, decisions):
    verdict("rejected")
    status, said = run()
    assert status == 0 and re.fullmatch(r"rejected version \d+, version 100 stays champion: R@1 \+2.0 points", said)
    assert ran() == OPERATIONS
    assert run() == (0, "nothing to do"), "what was rejected stays so"
    assert [line["decision"] for line in decisions()] == ["rejected", "nothing to do"]


def test_a_decision_that_nobody_was_told_is_told(root, run, registered, ran, webhook, decisions):
    """A kill between the gate and the line in the log."""
    assert run()[0] == 0
    (root / "models/decisions/log.jsonl").unlink()
    webhook.received.clear()
    assert run()[1].startswith("promoted version")
    assert ran() == OPERATIONS, "not judged again"
    assert [told["event"] for told in webhook.received] == ["promoted"]


def test_drift_is_told_and_decides_nothing(run, change, registered, webhook, decisions):
    change(drifted="")
    assert run()[1].startswith("promoted version")
    assert [told["event"] for told in webhook.received] == ["drift", "promoted"]
    assert "words per caption: 12 words instead of 82" in webhook.received[0]["text"]
    assert decisions()[-1]["drifted"] is True


def test_drift_that_cannot_be_measured_is_a_warning(run, registered, ran, change, decisions, caplog):
    change(status_drift="1")
    assert run()[1].startswith("promoted version")
    assert ran() == OPERATIONS
    assert "The drift of the data and of the model is not known this time" in caplog.text
    assert decisions()[-1]["drifted"] is None


def test_a_gate_that_fails_fails_the_flow_and_is_told(run, change, registered, webhook, decisions):
    change(status_gate="1")
    status, said = run()
    assert status == 1 and "the step `gate` failed (exit status 1)" in said and "gate: something happened" in said
    assert [told["event"] for told in webhook.received] == ["failed"]
    assert decisions()[-1]["decision"] == "failed"


def test_a_store_that_is_away_is_asked_again(flow, run, registered, ran, change, monkeypatch):
    change(status_gate=str(os.EX_TEMPFAIL))
    monkeypatch.setattr(flow.GATE, "retry_delay_seconds", [0.1, 0.1])
    assert run()[0] == 1
    assert ran() == ["drift", "gate", "gate", "gate"]


@pytest.mark.parametrize("trouble", ["dead", "slow", "refusing", "no address"])
def test_a_webhook_stops_nothing_and_stays_secret(flow, flows, registered, webhook, monkeypatch, run, caplog, trouble):
    from functools import partial

    monkeypatch.setattr(flow, "notify", partial(flows("notifying").notify, seconds=1.0))
    match trouble:
        case "dead":
            webhook.server_close()
            reason = "ConnectError"
        case "slow":
            webhook.seconds, reason = 5, "no answer within 1 s|ReadTimeout"
        case "refusing":
            webhook.status, reason = 403, "it answers 403"
        case _:
            monkeypatch.setenv("FAST_GOAL_WEBHOOK_URL", "not-an-address/a-secret")
            reason = "UnsupportedProtocol"
    begin = time.monotonic()
    assert run()[1].startswith("promoted version")
    assert time.monotonic() - begin < 60
    assert re.search(rf"Nobody was notified through the webhook at .*: ({reason})\.", caplog.text)
    assert "a-secret" not in caplog.text


def test_a_notification_block_of_prefect(root, run, registered, webhook, monkeypatch, caplog):
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    monkeypatch.delenv("FAST_GOAL_WEBHOOK_URL")
    body = {"title": "{{subject}}", "said": "{{body}}"}
    CustomWebhookNotificationBlock(name="team", url=webhook.url, json_data=body, allow_private_urls=True).save("team")
    monkeypatch.setenv("FAST_GOAL_NOTIFICATION_BLOCK", "custom-webhook/team")
    assert run()[0] == 0
    [told] = webhook.received
    assert told["title"] == "FAST-GOAL: promoted" and told["said"].startswith("Promoted version")
    monkeypatch.setenv("FAST_GOAL_NOTIFICATION_BLOCK", "custom-webhook/nobody")
    shutil.rmtree(root / "models/decisions")
    assert run()[0] == 0
    assert "Nobody was notified through the block 'custom-webhook/nobody'" in caplog.text


def test_a_firing_while_another_flow_works_says_so(flows, run, registered, ran, webhook, decisions):
    with flows("running").working_tree("reproduce", "prefect-first"):
        status, said = run()
    assert status == 1 and said.startswith("the flow reproduce (run ")
    assert ran() == [] and webhook.received == [] and decisions()[-1]["decision"] == "busy"


def test_a_failed_step_leaves_the_rest_for_the_next_time(run, registered, ran, change, new_data, decisions, webhook):
    change(status_base="3")
    new_data()
    status, said = run()
    assert status == 1 and "the step `base` failed" in said and ran() == ["download", "base"]
    assert [told["event"] for told in webhook.received] == ["failed"] and "the disk is on fire" in webhook.received[0]["text"]
    line = decisions()[-1]
    assert line["decision"] == "failed" and line["new_data"]


@pytest.mark.parametrize("steps", [("finetune", "gate")])
def test_a_killed_flow_is_taken_up_where_it_was(root, run, api, ran, change, new_data, started, steps):
    """kill -9 of the flow at one step after the other; the step ends, the next run goes on there, and does no step twice."""
    new_data()
    env = {**os.environ, "PREFECT_API_URL": api}
    for step in steps:
        change(**{f"hang_{step}": ""})
        process = subprocess.Popen([sys.executable, "flows/retrain.py"], cwd=root, env=env, start_new_session=True)
        try:
            left = started(process)
        finally:
            process.kill()
        process.wait()
        end = time.monotonic() + 30
        while psutil.pid_exists(left) and psutil.Process(left).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end, "the guard ends a step whose flow is gone"
            time.sleep(0.05)
        (root / f"hang_{step}").unlink()
    status, said = run()
    assert status == 0 and said.startswith("promoted version")
    assert ran(done=True) == list(STEPS)
    for step in STEPS:
        assert (root / f"{step}.txt").read_text() == (root / "start.txt").read_text()
    assert run() == (0, "nothing to do")


def test_times_are_checked_before_anything_is_started(root, run):
    for cron in ("nonsense", "61 * * * *", "0 3 31 2 *"):
        status, said = run("--cron", cron)
        assert status == 1 and said.startswith(f"--cron '{cron}'") and "'0 3 * * *' (every day at 3:00)" in said
    assert "'Mars'" in run("--cron", "0 3 * * *", "--timezone", "Mars")[1]
    assert not (root / ".fast_goal/prefect").exists()


def test_a_schedule_has_a_server_of_its_own_and_ends_with_it(root, tmp_path):
    command = [sys.executable, "-m", "fast_goal", "schedule", "--cron", "0 3 1 1 *"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_API")}
    wrong = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert wrong.returncode == 1 and "Run `fast-goal schedule` in the project's folder" in wrong.stderr

    env |= {"PREFECT_HOME": str(tmp_path / "home"), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=root, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        said = process.stdout.readline()
        assert said.startswith("retrain: at 0 3 1 1 * (UTC), next at 20") and "-01-01 03:00 UTC" in said
        api = said.split()[-1]
        end, found = time.monotonic() + 60, []
        while not found:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.2)
            found = httpx.post(f"{api}/deployments/filter", json={}).raise_for_status().json()
        [deployment] = found
        assert deployment["name"] == "scheduled" and deployment["schedules"][0]["schedule"]["cron"] == "0 3 1 1 *"
        shown = httpx.get(f"{api.removesuffix('/api')}/ui-settings").raise_for_status().json()
        assert shown["api_url"] == api, "the pages in the browser ask this server"
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert not [child for child in started if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert not (root / ".fast_goal/prefect/processes.json").exists()
