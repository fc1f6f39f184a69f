#!/bin/sh
# Installs what some tests use beside Python packages, where that is missing and can be had: Debian's packages, as root.
set -eu

wanted=""
for name in chromium chromium-browser google-chrome; do command -v "$name" >/dev/null && found=1 && break; done
[ -n "${found:-}" ] || wanted="$wanted chromium"
ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || wanted="$wanted postgresql"
command -v redis-server >/dev/null || wanted="$wanted redis-server"

[ -n "$wanted" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "Not installed, and not to be had without root and apt-get:$wanted"
    exit 0
fi
echo "Installing$wanted"
export DEBIAN_FRONTEND=noninteractive
install() { apt-get -qq -y --no-install-recommends install "$@" >/dev/null 2>&1; }
apt-get -qq -o Acquire::http::Timeout=30 update >/dev/null 2>&1 || true
case "$wanted" in *postgresql*)
    # The tests start servers of their own; the package need not make one.
    install postgresql-common && echo "create_main_cluster = false" >>/etc/postgresql-common/createcluster.conf || true
esac
for package in $wanted; do
    install "$package" || echo "$package can't be had: see CONTRIBUTING.md for what the tests do without it"
done
case "$wanted" in *redis-server*)
    # Likewise: nobody but the tests has asked for a server.
    systemctl disable --now redis-server >/dev/null 2>&1 || true
esac
