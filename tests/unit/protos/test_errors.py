import grpc
import grpc.aio
import pytest

from edge_client.transport.rpc import CODE_METADATA as CLIENT_METADATA
from edge_client.transport.rpc import translate
from edge_server.status import CODE_METADATA, status_of
from protos.errors import BY_CODE, HeadtailError, ModelError, from_code, from_peer

CODES = sorted(BY_CODE)


@pytest.mark.parametrize("code", CODES)
def test_every_error_has_a_status_an_exit_code_and_a_place_in_the_drawing(code: str) -> None:
    import protos.errors

    kind = BY_CODE[code]
    assert isinstance(status_of(kind("x")), grpc.StatusCode)
    assert status_of(kind("x")) is not grpc.StatusCode.OK
    assert 1 <= kind.exit_code <= 125
    if kind is not HeadtailError:
        line = next(each for each in (protos.errors.__doc__ or "").splitlines() if f" {kind.__name__} " in each)
        assert kind.grpc_status in line
        assert line.endswith(f"exit {kind.exit_code}")


@pytest.mark.parametrize("code", CODES)
def test_an_error_crosses_the_wire_as_itself(code: str) -> None:
    sent = BY_CODE[code]("what was wrong")
    status = grpc.aio.AioRpcError(
        status_of(sent), grpc.aio.Metadata(), grpc.aio.Metadata((CODE_METADATA, sent.code)), details=sent.message
    )
    received = translate(status, "host:1")
    if sent.exit_code == 1:  # the server's own fault is not this side's
        assert isinstance(received, ModelError)
        assert sent.message in received.message
    else:
        assert type(received) is type(sent)
        assert (received.message, received.retryable) == (sent.message, sent.retryable)


def test_no_word_of_a_peer_makes_its_fault_ours() -> None:
    for code in (*CODES, "", "no such code", "\x1b[2J", "x" * 100_000):
        error = from_peer(code, "why")
        assert error.exit_code != 1
        assert error.message.isprintable()
        assert len(error.message) < 200


@pytest.mark.parametrize("status", [s for s in grpc.StatusCode if s is not grpc.StatusCode.OK])
def test_a_status_without_a_code_still_becomes_an_error(status: grpc.StatusCode) -> None:
    bare = grpc.aio.AioRpcError(status, grpc.aio.Metadata(), grpc.aio.Metadata(), details="text")
    assert isinstance(translate(bare, "host:1"), HeadtailError)


def test_both_sides_use_the_same_metadata_key() -> None:
    assert CLIENT_METADATA == CODE_METADATA


def test_codes_are_distinct_and_rebuilt() -> None:
    assert len(set(BY_CODE.values())) == len(CODES)
    assert from_code("no such code", "x").code == "headtail"
    assert from_code("overloaded", "x").retryable
    assert not from_code("overloaded", "x", retryable=False).retryable
