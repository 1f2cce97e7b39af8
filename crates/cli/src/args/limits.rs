//! The limits of `listen`: what strangers may do, as options. The library has a table of them; their defaults are its own.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::time::Duration;

use buffstreams::{IpNet, ListenerBuilder};
use clap::Args;

use super::quantities::{parse_duration, parse_size};

#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
pub(crate) struct ListenLimits {
    /// Serve only senders in this network, such as `10.0.0.0/8`, or at this address; may be repeated [default: everybody]
    #[arg(long, value_name = "NETWORK", value_parser = parse_network)]
    allow: Vec<IpNet>,

    /// How many connections may be open [default: 65536]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    max_connections: Option<usize>,

    /// How many of them from one address, or from one IPv6 /64; `none` for any number [default: 1024, loopback any number]
    #[arg(long, value_name = "N", value_parser = lifted(parse_count))]
    max_connections_per_address: Option<Limit<usize>>,

    /// How many TLS handshakes may be under way, a quarter of them with one address [default: 256]
    #[arg(long, value_name = "N", requires = "tls_cert", value_parser = parse_count)]
    max_handshakes: Option<usize>,

    /// How long a handshake may take, of TLS or of an acknowledged stream; `none` for ever [default: 10s]
    #[arg(long, value_name = "DURATION", value_parser = lifted(parse_time))]
    handshake_deadline: Option<Limit<Duration>>,

    /// How long a message may take from its first byte to its last; `none` for ever [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = lifted(parse_time))]
    frame_deadline: Option<Limit<Duration>>,

    /// How long a connection may send nothing [default: none]
    #[arg(long, value_name = "DURATION", value_parser = lifted(parse_time))]
    idle_deadline: Option<Limit<Duration>>,

    /// How much unfinished messages of all connections may take [default: 1GiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_room)]
    receive_memory: Option<usize>,

    /// How much acknowledged messages may take that wait to be printed [default: 256MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_room)]
    session_memory: Option<usize>,

    /// How much an acknowledged stream may send ahead of acknowledgements [default: 4MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_room)]
    session_window: Option<usize>,

    /// How many messages of one connection are taken in a second; further ones wait [default: none]
    #[arg(long, value_name = "N", value_parser = lifted(parse_rate))]
    max_message_rate: Option<Limit<NonZeroU32>>,

    /// How much may wait to be sent back to one connection, with --echo [default: 1MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    reply_memory: Option<usize>,

    /// How long a peer may vanish, or refuse to read, while it is owed something; `none` for the system's time [default: 120s]
    #[arg(long, value_name = "DURATION", value_parser = lifted(parse_time))]
    write_stall: Option<Limit<Duration>>,

    /// After how long a silence the system asks whether the peer is still there; `none` for never [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = lifted(parse_time))]
    keepalive: Option<Limit<Duration>>,
}

/// A limit that may be none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limit<T>(Option<T>);

impl ListenLimits {
    /// Sets what was said; the rest stays as it is.
    pub(crate) fn apply(&self, mut builder: ListenerBuilder) -> ListenerBuilder {
        if !self.allow.is_empty() {
            builder = builder.allow(self.allow.iter().copied());
        }
        if let Some(most) = self.max_connections {
            builder = builder.max_connections(most);
        }
        if let Some(Limit(most)) = self.max_connections_per_address {
            builder = builder.max_connections_per_address(most);
        }
        if let Some(most) = self.max_handshakes {
            builder = builder.max_handshakes(most);
        }
        if let Some(Limit(allowed)) = self.handshake_deadline {
            builder = builder.handshake_deadline(allowed);
        }
        if let Some(Limit(allowed)) = self.frame_deadline {
            builder = builder.frame_deadline(allowed);
        }
        if let Some(Limit(allowed)) = self.idle_deadline {
            builder = builder.idle_deadline(allowed);
        }
        if let Some(bytes) = self.receive_memory {
            builder = builder.receive_memory(bytes);
        }
        if let Some(bytes) = self.session_memory {
            builder = builder.session_memory(bytes);
        }
        if let Some(bytes) = self.session_window {
            builder = builder.session_window(bytes);
        }
        if let Some(Limit(rate)) = self.max_message_rate {
            builder = builder.max_message_rate(rate);
        }
        if let Some(bytes) = self.reply_memory {
            builder = builder.reply_memory(bytes);
        }
        if let Some(Limit(allowed)) = self.write_stall {
            builder = builder.write_stall(allowed);
        }
        if let Some(Limit(after)) = self.keepalive {
            builder = builder.keepalive(after);
        }
        builder
    }
}

/// The same, or `none`.
fn lifted<T>(
    parse: fn(&str) -> Result<T, String>,
) -> impl Fn(&str) -> Result<Limit<T>, String> + Clone + Send + Sync + 'static
where
    T: 'static,
{
    move |text| match text {
        "none" => Ok(Limit(None)),
        _ => parse(text).map(|limit| Limit(Some(limit))).map_err(|why| format!("{why}; or none")),
    }
}

fn parse_time(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        Duration::ZERO => Err("no time at all would let nobody in: write how long, such as 30s".to_owned()),
        time => Ok(time),
    }
}

fn parse_count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("none at all would let nobody in: write a whole number from 1".to_owned()),
        count => count.map_err(|_| String::from("write a whole number from 1")),
    }
}

fn parse_room(text: &str) -> Result<usize, String> {
    match parse_size(text)? {
        0 => Err("no room at all would take no message: write how much, such as 1MiB".to_owned()),
        size => Ok(size),
    }
}

fn parse_rate(text: &str) -> Result<NonZeroU32, String> {
    text.parse().map_err(|_| String::from("write a whole number from 1"))
}

fn parse_network(text: &str) -> Result<IpNet, String> {
    let address = || text.parse::<IpAddr>().map(IpNet::from);
    text.parse::<IpNet>()
        .or_else(|_| address())
        .map_err(|_| String::from("write a network or an address: 10.0.0.0/8, 2001:db8::/32, 192.0.2.7"))
}

#[cfg(test)]
mod tests {
    use clap::{Command, CommandFactory, Parser};

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        limits: ListenLimits,
        #[arg(long)]
        tls_cert: bool,
    }

    fn parse(arguments: &[&str]) -> Result<ListenLimits, clap::Error> {
        Line::try_parse_from(["listen"].iter().chain(arguments)).map(|line| line.limits)
    }

    #[test]
    fn a_limit_is_what_was_said_or_none() {
        let limits = parse(&["--idle-deadline", "5m", "--frame-deadline", "none", "--max-message-rate", "7"]).unwrap();
        assert_eq!(limits.idle_deadline, Some(Limit(Some(Duration::from_secs(300)))));
        assert_eq!(limits.frame_deadline, Some(Limit(None)));
        assert_eq!(limits.max_message_rate, Some(Limit(NonZeroU32::new(7))));
        assert_eq!((limits.handshake_deadline, limits.max_connections_per_address), (None, None));
        let networks = parse(&["--allow", "10.0.0.0/8", "--allow", "::1"]).unwrap().allow;
        assert_eq!(networks.iter().map(IpNet::to_string).collect::<Vec<_>>(), ["10.0.0.0/8", "::1/128"]);
        for bad in [["--max-message-rate", "0"], ["--allow", "10.0.0.0/33"], ["--allow", "example.com"]] {
            assert!(parse(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_limit_with_which_nobody_could_be_served_is_refused() {
        let options = [
            "max-connections",
            "max-connections-per-address",
            "max-handshakes",
            "handshake-deadline",
            "frame-deadline",
            "idle-deadline",
            "receive-memory",
            "session-memory",
            "session-window",
            "write-stall",
        ];
        for option in options {
            let told = parse(&["--tls-cert", &format!("--{option}=0")]).unwrap_err().to_string();
            assert!(told.contains(option) && told.contains("write "), "{told}");
        }
    }

    #[test]
    fn the_defaults_that_the_help_names_are_those_of_the_library() {
        let command: Command = Line::command();
        let table = include_str!("../../../buffstreams/limits.md");
        let mut named = 0;
        for row in table.lines().filter_map(|line| line.strip_prefix("| `")) {
            let cells: Vec<_> = row.split(" | ").collect();
            let (name, default) = (cells[0].trim_end_matches('`'), cells[1]);
            let Some(option) = command.get_arguments().find(|option| option.get_id() == name) else { continue };
            let help = option.get_help().expect("it is explained").to_string();
            let (_, said) = help.rsplit_once("[default: ").expect("it has a default");
            let said = said.trim_end_matches(']').split(',').next().expect("a word");
            let real = default.split(';').next().expect("a word").replace(" for the process", "").replace(',', "");
            assert_eq!(said, real.replace(' ', ""), "{name}");
            named += 1;
        }
        assert_eq!(named, command.get_arguments().filter(|option| option.get_id() != "tls_cert").count());
    }
}
