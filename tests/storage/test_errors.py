"""Errors of buckets: those that pass end with exit code 75, never with 2."""

import aiohttp
import google.api_core.exceptions
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
from gcsfs.retry import HttpError, validate_response
from google.auth.exceptions import DefaultCredentialsError
from s3fs.errors import translate_boto_error

from alignvlm_jax.commands.program import run_program
from alignvlm_jax.errors import TemporaryError, UserError
from alignvlm_jax.storage import errors
from alignvlm_jax.storage.errors import mark_as_used, translate, translated_errors


def forbidden(message="anna does not have storage.objects.get access"):
    try:
        validate_response(403, f'{{"error": {{"message": "{message}"}}}}', "b/bucket/o")
    except OSError as error:
        return error


def s3_error(code, status):
    response = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(response, "PutObject"))


TEMPORARY = [
    HttpError({"code": 503, "message": "Service Unavailable"}),
    HttpError({"code": 429, "message": "Too Many Requests"}),
    forbidden("Rate Limit Exceeded"),
    google.api_core.exceptions.ServiceUnavailable("try again"),
    s3_error("SlowDown", 503),
    s3_error("InternalError", 500),
    aiohttp.ServerDisconnectedError(),
    EndpointConnectionError(endpoint_url="http://127.0.0.1"),
    TimeoutError(),
    ValueError("UNAVAILABLE: Error writing gs://bucket/x: backend error [http_response_code='503']"),
    ValueError("OUT_OF_RANGE: Error reading Byte range [9, 11) of gs://bucket/x [http_response_code='416']"),
]
PERMANENT = [
    forbidden(),
    HttpError({"code": 401, "message": "Invalid Credentials"}),
    s3_error("AccessDenied", 403),
    ValueError("PERMISSION_DENIED: Error reading gs://bucket-b/x: no access [http_response_code='403']"),
    NoCredentialsError(),
    DefaultCredentialsError("none"),
]


@pytest.mark.parametrize("error", TEMPORARY, ids=lambda error: type(error).__name__)
def test_errors_that_pass(error):
    """fsspec/gcsfs#505, #645: rate limits and 5xx answers outlast the retries of the library."""
    assert isinstance(translate(error, "gs://bucket-a/x"), TemporaryError)


@pytest.mark.parametrize("error", PERMANENT, ids=lambda error: type(error).__name__)
def test_errors_that_a_person_must_fix(error):
    translated = translate(error, "gs://bucket-b/x")
    assert type(translated) is UserError and "gs://bucket-b/x: no " in str(translated)


def test_a_permission_that_was_lost_during_a_run_may_come_back():
    """GoogleCloudPlatform/gcsfuse#1018: 403 while the token of a workload identity is renewed."""
    mark_as_used("s3://bucket-c/run")
    for error in PERMANENT[:4]:
        assert isinstance(translate(error, "s3://bucket-c/run/checkpoints"), TemporaryError)
    # The errors of TensorStore and gcsfs name the bucket.
    named = [PERMANENT[3], OSError("Forbidden: b/bucket-b/o/x\nno access")]
    assert [type(translate(error, "gs://bucket-d")) for error in named] == [UserError] * 2
    mark_as_used("gs://bucket-b/run")
    assert isinstance(translate(named[0]), TemporaryError)
    assert errors._named_bucket(named[1]) == "bucket-b"


def test_other_errors_stay_as_they_are():
    for error in (ValueError("shape"), TimeoutError(), KeyError("code"), OSError(28, "No space left on device")):
        assert translate(error) is None
    with pytest.raises(ZeroDivisionError), translated_errors("gs://bucket/x"):
        1 / 0  # noqa: B018
    with pytest.raises(FileNotFoundError), translated_errors("gs://bucket/x"):
        raise FileNotFoundError("gs://bucket/x")


def test_an_outage_that_outlasts_the_retries_of_google_cloud_storage_passes():
    error = google.api_core.exceptions.RetryError("Timeout of 30.0s exceeded", cause=None)
    error.__cause__ = google.api_core.exceptions.ServiceUnavailable("backend error")
    assert isinstance(translate(error), TemporaryError)


def test_a_command_ends_with_one_line(capsys):
    """An error that no code expected, where the command ends."""

    def body(status):
        validate_response(status, '{"error": {"message": "Backend Error"}}', "b/bucket/o/x")

    assert run_program("alignvlm", lambda: body(503)) == 75
    assert run_program("alignvlm", lambda: body(403)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "cannot be reached now (Backend Error" in lines[0] and "no permission" in lines[1]
