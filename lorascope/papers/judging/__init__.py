"""Judging of the claims: registration, kept runs, statistics, verdicts and their verification; without torch."""
