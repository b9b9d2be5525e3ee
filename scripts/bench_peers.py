"""Who is compared by scripts/bench: the servers at the far end, and the commands that copy to them."""
import contextlib, os, shlex, shutil, signal, socket, subprocess, sys, time
from bench_data import CHANGES

TICK = os.sysconf("SC_CLK_TCK")
GCM = "aes128-gcm@openssh.com"
DATA_PORTS = "22100-22199"
SFTP_SERVERS = ("/usr/lib/openssh/sftp-server", "/usr/libexec/sftp-server")


def cpu_of(pids):
    """CPU seconds of processes and of their children that have ended."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
            ticks += sum(int(field) for field in fields[11:15])
    return ticks / TICK


def families(roots):
    """Each of these processes with its descendants, those first that are nearer to it."""
    children = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{name}/stat") as stat:
                children.setdefault(int(stat.read().rpartition(")")[2].split()[1]), []).append(int(name))
    families = [[pid] for pid in roots]
    for family in families:
        for pid in family:
            family.extend(children.get(pid, ()))
    return families


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Starts a command, and is given and waits for whatever its descendants leave behind, so that their processor time is known.
REAPER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
server = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
signal.signal(signal.SIGTERM, lambda *_: os.kill(server, signal.SIGTERM))
while os.wait()[0] != server:
    pass
"""


class Servers:
    """An sshd that knows lockstep as a subsystem, one whose lockstep may listen beside it, one that has none, and lockstep's own server. What a user's shell does when it starts
    is no part of what is measured: their home is an empty directory."""

    def __init__(self, at, lockstep, network):
        self.at, self.network, self.started = at, network, {}
        self.key, self.known_hosts = f"{at}/key", f"{at}/known_hosts"
        for name in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{at}/{name}"], check=True)
        shutil.copy(f"{at}/key.pub", f"{at}/authorized_keys")
        self.user = os.environ.get("USER") or "root"
        os.makedirs(f"{at}/home")
        sftp = next(p for p in SFTP_SERVERS if os.path.exists(p))
        os.makedirs("/run/sshd", exist_ok=True)
        common = f"""ListenAddress {network.address}
HostKey {at}/host_key
AuthorizedKeysFile {at}/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
PidFile none
SetEnv HOME={at}/home
LogLevel ERROR
MaxStartups 100
Subsystem sftp {sftp}
"""
        self.ports = {name: free_port() for name in ("sshd", "ports", "stock", "serve")}
        with open(f"{at}/host_key.pub") as public, open(self.known_hosts, "w") as out:
            key = " ".join(public.read().split()[:2])
            for port in self.ports.values():
                out.write(f"[{network.address}]:{port} {key}\n")
        agent = f"Subsystem lockstep {lockstep} sftp-server"
        for name, more in (("sshd", f"{agent}\n"), ("ports", f"{agent} --data-ports {DATA_PORTS}\n"), ("stock", "")):
            with open(f"{at}/{name}.conf", "w") as out:
                out.write(f"Port {self.ports[name]}\n{common}{more}")
            self.start(name, [shutil.which("sshd") or "/usr/sbin/sshd", "-D", "-f", f"{at}/{name}.conf"])
        self.start("serve", [lockstep, "serve", "--listen", f"{network.address}:{self.ports['serve']}", "--user", self.user,
                             "--root", "/", "--authorized-keys", f"{at}/authorized_keys", "--host-key", f"{at}/host_key"])

    def start(self, name, command):
        with open(f"{self.at}/{name}.log", "w") as log:
            reaper = [sys.executable, "-S", "-c", REAPER, *command]
            self.started[name] = subprocess.Popen(self.network.far(reaper), stdout=log, stderr=log, start_new_session=True)

    def wait(self):
        """Returns when all of them answer."""
        for name, port in self.ports.items():
            until = time.monotonic() + 10
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex((self.network.address, port)) == 0:
                        break
                if time.monotonic() > until:
                    with open(f"{self.at}/{name}.log") as log:
                        sys.exit(f"{name} did not start: {log.read()}")
                time.sleep(0.05)

    def pid(self, contender):
        """Of the process that started the server that a contender talks to."""
        name, *kind = contender.split()
        kind = kind[0].replace("mirror", "serve").replace("pull", "serve") if name == "lockstep" else "stock"
        return self.started[kind].pid

    def stop(self):
        # A session of a client that was ended may not have noticed yet, and would go on writing.
        sessions = [pid for family in families([process.pid for process in self.started.values()]) for pid in family[2:]]
        for process in self.started.values():
            process.send_signal(signal.SIGTERM)
        for pid in sessions:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.started.values():
            process.wait()


def contenders(servers, lockstep):
    """The command of each contender, as a function of source and target; and the programs that are not installed."""
    options = ["-o", "StrictHostKeyChecking=yes", "-o", f"UserKnownHostsFile={servers.known_hosts}", "-o", "LogLevel=ERROR",
               "-F", "none", "-i", servers.key, "-o", "IdentitiesOnly=yes"]
    port, address = str(servers.ports["stock"]), servers.network.address
    host = f"{servers.user}@{address}"
    gcm = ["-c", GCM]

    def push(kind, *more):
        def command(source, target):
            return [lockstep, "push", "-q", "-P", str(servers.ports[kind]), "--identity", servers.key,
                    "--known-hosts", servers.known_hosts, *more, source, f"{host}:{target}"]
        return command

    def rsync(cipher, *more):
        def command(source, target):
            return ["rsync", "-a", *more, "-e", shlex.join(["ssh", "-p", port, *options, *cipher]), source + "/", f"{host}:{target}/"]
        return command

    def pull(source, target):
        return [lockstep, "pull", "-q", "-P", str(servers.ports["serve"]), "--identity", servers.key,
                "--known-hosts", servers.known_hosts, f"{host}:{source}", target]

    def rsync_pull(source, target):
        return ["rsync", "-a", "-e", shlex.join(["ssh", "-p", port, *options, *gcm]), f"{host}:{source}/", target + "/"]

    def tar(pack, unpack):
        def command(source, target):
            ssh = shlex.join(["ssh", "-p", port, *options, *gcm, host, f"mkdir -p {target} && {unpack} tar -x -C {target}"])
            return ["bash", "-o", "pipefail", "-c", f"tar -c -C {source} . | {pack} {ssh}"]
        return command

    def four(source, target):
        """A quarter of each file over each of four connections, as mscp does it over SFTP, which is no package of Debian."""
        ssh = shlex.join(["ssh", "-p", port, *options, *gcm, host])
        script = f"""{ssh} mkdir -p {target} && cd {source} || exit
for file in *; do
    running=
    quarter=$(($(stat -c %s "$file") / 4194304 + 1))
    for first in 0 $quarter $((2 * quarter)) $((3 * quarter)); do
        dd if="$file" bs=1M skip=$first count=$quarter status=none |
            {ssh} dd of={target}/"$file" bs=1M seek=$first conv=notrunc iflag=fullblock status=none &
        running+=" $!"
    done
    for one in $running; do wait "$one" || exit; done
done"""
        return ["bash", "-o", "pipefail", "-c", script]

    def scp(source, target):
        return ["scp", "-q", "-r", "-p", *gcm, "-P", port, *options, source + "/.", f"{host}:{target}"]

    def sftp(source, target):
        batch = f"{servers.at}/batch"
        with open(batch, "w") as out:
            out.write(f"put -R -p {source}/. {target}\n")
        return ["sftp", "-q", "-b", batch, *gcm, "-P", port, *options, host]

    def lftp(source, target):
        ssh = shlex.join(["ssh", "-a", "-x", *options, *gcm])
        script = (f"set cmd:fail-exit yes; set sftp:connect-program {shlex.quote(ssh)}; set sftp:size-write 32k; set sftp:max-packets-in-flight 128; "
                  f"set net:connection-limit 8; open -u {servers.user}, sftp://{address}:{port}; mkdir -p -f {target}; mirror -R --parallel=8 {source} {target}")
        return ["lftp", "-c", script]

    def rclone(concurrency, *more):
        def command(source, target):
            remote = (f":sftp,host={address},port={port},user={servers.user},key_file={servers.key},known_hosts_file={servers.known_hosts},"
                      f"chunk_size=255Ki,concurrency={concurrency},ciphers={GCM}:{target}")
            return ["rclone", "copy", "--config", "/dev/null", "-q", "--sftp-disable-hashcheck", *more, source, remote]
        return command

    found = {
        "lockstep serve": push("serve"),
        "lockstep mirror": push("serve", "--delete"),
        "lockstep sshd": push("sshd"),
        "lockstep ports": push("ports"),
        "lockstep stock": push("stock", "--remote", "sftp"),
        "lockstep stock mirror": push("stock", "--remote", "sftp", "--delete"),
        "lockstep pull": pull,
        "rsync": rsync([]),
        "rsync gcm": rsync(gcm),
        "rsync zstd": rsync(gcm, "--compress", "--zc=zstd"),
        "rsync whole": rsync(gcm, "--whole-file"),
        "rsync inplace": rsync(gcm, "--inplace"),
        "rsync append": rsync(gcm, "--append"),
        "rsync mirror": rsync(gcm, "--delete"),
        "rsync pull": rsync_pull,
        "tar gcm": tar("", ""),
        "tar zstd": tar("zstd -q -T0 |", "zstd -q -d |"),
        "dd x4": four,
        "scp gcm": scp,
        "sftp gcm": sftp,
        "lftp gcm": lftp,
        "rclone": rclone(64, "--transfers", "8", "--checkers", "8"),
        "rclone tuned": rclone(256, "--transfers", "32", "--checkers", "32", "--no-traverse", "--buffer-size", "64Mi"),
    }
    missing = sorted({word for name in found for word in name.split() if word in ("rsync", "tar", "zstd", "lftp", "rclone") and not shutil.which(word)})
    return {name: command for name, command in found.items() if not set(name.split()) & set(missing)}, missing


def takes_part(name, row):
    """What only differs for a file that there is an older version of is left out elsewhere."""
    if name == "rsync append":
        return row == "appended"
    if name.endswith(" mirror"):
        return row == "renamed"
    if name.endswith(" pull"):
        return row in CHANGES and row != "appended"
    if name == "dd x4":
        return row in ("random", "bf16")
    return name not in ("rsync whole", "rsync inplace") or row in CHANGES


def over_sftp(name):
    """Whether a contender wants nothing at the far end but SFTP."""
    return name.split()[0] in ("scp", "sftp", "lftp", "rclone") or name.startswith("lockstep stock")
