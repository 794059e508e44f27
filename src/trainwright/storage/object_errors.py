"""What an object store's errors mean, in our words: got / rule / remedy.

The stores' own libraries are optional and are not imported here: their exceptions are known by name.
"""

from __future__ import annotations

from trainwright.errors import StorageError

__all__ = ["explain", "passes"]

_PACKAGES = {
    "s3": "'trainwright[s3]'",
    "s3a": "'trainwright[s3]'",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
    "hf": "huggingface_hub",
    "oci": "ocifs",
}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}
_UNREACHABLE = {
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ConnectionError",
    "ConnectionRefusedError",
    "ClientConnectorError",
    "ClientConnectorDNSError",
    "gaierror",
}


def passes(error: BaseException) -> bool:
    """Whether the same call may succeed when it is made again: a cut connection, an overloaded or absent server, bytes
    that arrived changed; not a missing object, a missing right or a missing package."""
    lasting = (FileNotFoundError, PermissionError, ImportError, NotImplementedError)
    if isinstance(error, lasting) or not _NO_CREDENTIALS.isdisjoint(_names(error)):
        return False
    return not isinstance(error, StorageError)


def explain(error: BaseException, url: str, doing: str) -> StorageError:
    """The error that users get. doing: what was tried, such as "reading rank-00000.safetensors"."""
    if isinstance(error, StorageError):
        return error
    scheme = url.split("://")[0]
    got = f"{url}: {doing}: {_first_line(error)}"
    if isinstance(error, ImportError):
        package = _PACKAGES.get(scheme, f"the fsspec package for {scheme}://")
        missing = f"{url}: no package for {scheme}:// is installed ({_first_line(error)})"
        return StorageError(missing, "an object store is reached through its fsspec package", f"pip install {package}")
    names = _names(error)
    if "Protocol not known" in str(error):
        return StorageError(f"{url}: {scheme}:// is not known", "a URL that fsspec knows", "s3://bucket/prefix")
    if not _NO_CREDENTIALS.isdisjoint(names) or "Unable to locate credentials" in str(error):
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine a role"
        return StorageError(f"{url}: {doing}: no credentials were found", "a bucket is opened with a key", remedy)
    if isinstance(error, PermissionError):
        rule = "the key may list, read, write and delete under the prefix (a data set: list and read)"
        return StorageError(got, rule, "check the key, its rights to this bucket, and this machine's clock")
    if isinstance(error, FileNotFoundError):
        bucket = "bucket" in str(error).lower()
        rule = "the bucket exists" if bucket else "the object is there"
        return StorageError(got, rule, "create the bucket, or correct its name" if bucket else "look at the prefix")
    if not _UNREACHABLE.isdisjoint(names):
        remedy = "check the network and, for a store that is not AWS's own, AWS_ENDPOINT_URL"
        return StorageError(got, "the store can be reached from every machine of the job", remedy)
    return StorageError(got, "the store answers", "try again; if it lasts, look at the store's own status")


def _names(error: BaseException) -> set[str]:
    """Class names of an error, of its bases, and of those that caused it."""
    found: set[str] = set()
    seen: BaseException | None = error
    while seen is not None:
        found |= {kind.__name__ for kind in type(seen).__mro__}
        seen = seen.__cause__ or seen.__context__
    return found


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
