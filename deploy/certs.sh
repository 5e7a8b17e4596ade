#!/usr/bin/env bash
# A private certificate authority for one site, and certificates for its servers and devices (ECDSA P-256, openssl >= 3).
#
#   deploy/certs.sh ca     DIR                          ca.pem, ca.key
#   deploy/certs.sh server DIR NAME HOST|IP [HOST|IP…]  NAME.pem, NAME.key; valid for those names
#   deploy/certs.sh client DIR NAME                     NAME.pem, NAME.key; for a device, mutual TLS
#   deploy/certs.sh show   DIR NAME                     what a certificate says
#
#   edge-server --tls-cert DIR/NAME.pem --tls-key DIR/NAME.key --tls-client-ca DIR/ca.pem …
#   edge-client --tls-ca DIR/ca.pem --tls-cert DIR/NAME.pem --tls-key DIR/NAME.key …
#
# Keys are readable by their owner alone. Keep ca.key off servers and devices: whoever holds it can be any of them.
# There is no revocation: a device is shut out by its token, or by a new authority. DAYS sets the validity (default 397).
set -euo pipefail
umask 077

fail() { echo "certs.sh: $1" >&2; exit 2; }
quiet() { local said; said=$("$@" 2>&1) || { echo "$said" >&2; fail "openssl failed, see above"; }; }
usage() { sed -n '2,8p' "$0" | sed 's/^# \{0,1\}//'; exit 2; }

authority() {
  [[ ! -e $dir/ca.key ]] || fail "$dir/ca.key exists already; a second authority needs a directory of its own"
  mkdir -p "$dir"
  quiet openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -sha256 -days "${DAYS:-3650}" \
    -subj "/CN=headtail private CA" -addext "basicConstraints=critical,CA:TRUE,pathlen:0" \
    -addext "keyUsage=critical,keyCertSign,cRLSign" -keyout "$dir/ca.key" -out "$dir/ca.pem"
  chmod 644 "$dir/ca.pem"
}

# issue NAME serverAuth|clientAuth SUBJECT_ALT_NAMES
issue() {
  local name=$1 purpose=$2 names=$3
  [[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$ && $name != ca ]] || fail "$name is no file name for a certificate (letters, digits, . _ -)"
  [[ -r $dir/ca.key ]] || fail "$dir/ca.key is missing: run 'deploy/certs.sh ca $dir' first"
  trap 'rm -f "$dir"/*.new' EXIT
  quiet openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -sha256 -subj "/CN=$name" \
    -keyout "$dir/$name.key.new" -out "$dir/$name.csr.new"
  quiet openssl x509 -req -in "$dir/$name.csr.new" -CA "$dir/ca.pem" -CAkey "$dir/ca.key" -sha256 -days "${DAYS:-397}" -out "$dir/$name.pem.new" \
    -extfile <(printf 'basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=%s\nsubjectAltName=%s\n' \
      "$purpose" "$names")
  rm "$dir/$name.csr.new"
  chmod 644 "$dir/$name.pem.new"
  mv "$dir/$name.key.new" "$dir/$name.key"
  mv "$dir/$name.pem.new" "$dir/$name.pem"
}

alternatives() {
  local host list=""
  for host in "$@"; do
    if [[ $host =~ ^[0-9.]+$ || $host == *:* ]]; then list+=",IP:$host"; else
      [[ $host =~ ^[A-Za-z0-9*][A-Za-z0-9.-]*$ ]] || fail "$host is neither a host name nor an address"
      list+=",DNS:$host"
    fi
  done
  echo "${list#,}"
}

command -v openssl >/dev/null || fail "openssl is not installed"
case "${1:-} $#" in
  "ca 2") dir=$2; authority; echo "$dir/ca.pem" ;;
  "client 3") dir=$2; issue "$3" clientAuth "DNS:$3"; echo "$dir/$3.pem" ;;
  "show 3") openssl x509 -in "$2/$3.pem" -noout -subject -issuer -dates -ext subjectAltName,extendedKeyUsage ;;
  "server "*) (($# >= 4)) || usage; dir=$2 name=$3; shift 3
    names=$(alternatives "$@"); issue "$name" serverAuth "$names"; echo "$dir/$name.pem" ;;
  *) usage ;;
esac
