# SPDX-License-Identifier: GPL-2.0
#
# A thin face: the module for this host's kernel is built here, everything else
# happens in scripts/bootstrap (a Debian sysroot in the cache) and cargo xtask.

KVER ?= $(shell uname -r)
KDIR ?= /lib/modules/$(KVER)/build
# The kernel that KDIR belongs to, which need not be the one that runs.
RELEASE := $(or $(shell cat "$(KDIR)/include/config/kernel.release" 2>/dev/null),$(KVER))
MO := $(CURDIR)/target/module-$(RELEASE)
DESTDIR ?=
PREFIX ?= /usr/local

all: preflight
	$(MAKE) -C $(KDIR) M=$(CURDIR) MO=$(MO) modules
	@echo "built $(MO)/thinram.ko for kernel $(RELEASE)"

preflight:
	@KDIR="$(KDIR)" KVER="$(RELEASE)" DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)" scripts/preflight

kdir module check test test-full coverage demo bench host-shell uml-shell setup:
	@scripts/bootstrap $@ $(ARGS)

HOURS ?= 1
soak:
	@scripts/bootstrap soak --hours $(HOURS)

ctl:
	@command -v cargo >/dev/null || { echo 'thinram: cargo is missing (Debian: cargo): install it' >&2; exit 1; }
	cargo build --release --package thinramctl --target-dir target

install: all ctl
	$(MAKE) -C $(KDIR) M=$(CURDIR) MO=$(MO) INSTALL_MOD_PATH=$(DESTDIR) modules_install
	$(if $(DESTDIR),,depmod $(RELEASE))
	install -D -m 755 target/release/thinramctl $(DESTDIR)$(PREFIX)/sbin/thinramctl
	target/release/thinramctl man --dir $(DESTDIR)$(PREFIX)/share/man/man1
	for i in bash:bash-completion/completions/thinramctl zsh:zsh/site-functions/_thinramctl \
	    fish:fish/vendor_completions.d/thinramctl.fish; do \
	    f=$(DESTDIR)$(PREFIX)/share/$${i#*:}; mkdir -p $${f%/*}; \
	    target/release/thinramctl completions $${i%%:*} >$$f || exit 1; done
	mkdir -p $(DESTDIR)$(PREFIX)/lib/systemd/system
	sed 's|/usr/local|$(PREFIX)|' userspace-ctl/dist/thinramctl.service \
	    >$(DESTDIR)$(PREFIX)/lib/systemd/system/thinramctl.service
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/doc/thinram userspace-ctl/dist/thinram.toml \
	    userspace-ctl/dist/thinram-alerts.yml userspace-ctl/dist/grafana-thinram.json

clean:
	rm -rf target

help:
	@echo 'On a KVM host:'
	@echo '  make            build thinram.ko for the running kernel (or KDIR=, KVER=)'
	@echo '  make kdir       prepare a KDIR from the distribution'"'"'s kernel source'
	@echo '  make install    install the module and thinramctl with its manual pages (DESTDIR=, PREFIX=)'
	@echo 'Anywhere (in a Debian sysroot that is made below ~/.cache/thinram):'
	@echo '  make demo       three KVM guests share memory on a stock kernel'
	@echo '  make test       every test;   make check   formatting, lints, layering'
	@echo '  make test-full  and all of it once more on a kernel with sanitizers: takes hours'
	@echo '  make coverage   which lines the host'"'"'s tests run'
	@echo '  make bench      ThinRAM against KSM, zswap and hugetlbfs'
	@echo '  make soak HOURS=1   guests come and go, and no memory is missing at the end'
	@echo '  make module     build thinram.ko for the stock Debian kernel'
	@echo '  make host-shell a shell in the KVM host;  make uml-shell  in UML'
	@echo '  make clean      remove target/'

.PHONY: all preflight kdir module check test test-full coverage demo bench soak host-shell uml-shell setup ctl install clean help
