"""The version of client and gateway, which is that of the whole project."""

VERSION = "0.1.0"
