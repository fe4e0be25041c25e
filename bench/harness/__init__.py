"""How a question is put, timed, weighed, judged and stored. Nothing here knows a question, a rival or a report."""
