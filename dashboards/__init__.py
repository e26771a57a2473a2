"""Pages for people, shipped as files; the Python here only generates some of them and is never imported by powerd."""
