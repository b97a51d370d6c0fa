"""The version of the package, read by the build and written into what is published."""

__version__ = "0.1.0"


def installed_versions(*libraries: str) -> dict[str, str]:
    """The versions of this package and of those of `libraries` that are installed, by their names on PyPI."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"peft-gradproj": __version__}
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
