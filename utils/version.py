"""The version of the project. CITATION.cff and the newest entry of CHANGELOG.md repeat it; a test compares them."""

VERSION = "0.3.0"
