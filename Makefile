# Where there is no make: python scripts/make.py test (or demo). The first Python from 3.11 to 3.13 is taken; PYTHON=… names another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1 && echo $$p && break; done || echo python3)

.PHONY: demo test
demo test:
	$(PYTHON) scripts/make.py $@
