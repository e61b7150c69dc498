"""The parts of run.py: environment, hosts, server, tests, benchmark records."""
